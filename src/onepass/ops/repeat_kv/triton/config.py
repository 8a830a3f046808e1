"""How the kernels of repeat_kv are cut."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class RepeatKvConfig:
    """A program does block_rows heads of tokens, block_cols features of each."""

    block_rows: int
    block_cols: int
    num_warps: int


_BLOCK, _WARPS = 2048, 4


@functools.lru_cache(maxsize=64)
def config(head_dim: int) -> RepeatKvConfig:
    block_cols = min(_BLOCK, 1 << (head_dim - 1).bit_length())
    return RepeatKvConfig(_BLOCK // block_cols, block_cols, _WARPS)
