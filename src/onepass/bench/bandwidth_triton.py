"""The roof of memory-bound operations on a GPU: kernels that only read, and that only copy, with nothing to compute.

`blocks` programs share the memory; each takes blocks of BLOCK elements in turn, which is one where there are as many
programs as blocks.
"""

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 8


@triton.jit
def _read_kernel(x_ptr, result_ptr, num_blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    together = tl.zeros([BLOCK], tl.int32)
    for block in range(program, num_blocks, tl.num_programs(0)):
        together ^= tl.load(x_ptr + tl.cast(block, tl.int64) * BLOCK + columns)
    tl.store(result_ptr + program, tl.xor_sum(together, 0))  # keeps the loads alive


@triton.jit
def _copy_kernel(x_ptr, y_ptr, num_blocks, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        offset = tl.cast(block, tl.int64) * BLOCK
        tl.store(y_ptr + offset + columns, tl.load(x_ptr + offset + columns))


def read(x: Tensor, results: Tensor, blocks: int, block_size: int) -> None:
    """Reads int32 `x` in blocks of `block_size` elements on `blocks` programs; leaves the exclusive or of all that each
    has read in `results` (blocks,).
    """
    _read_kernel[(blocks,)](x, results, x.numel() // block_size, BLOCK=block_size, num_warps=NUM_WARPS)


def copy(x: Tensor, y: Tensor, blocks: int, block_size: int) -> None:
    """Copies int32 `x` to `y` in the same way."""
    _copy_kernel[(blocks,)](x, y, x.numel() // block_size, BLOCK=block_size, num_warps=NUM_WARPS)
