"""softmax of wide rows on NVIDIA GPUs, forward, in Gluon: rows wait in shared memory, so that memory never does.

One program to a multiprocessor keeps a ring of stages in shared memory and walks its rows through it. A row is read
from memory once: it arrives by cp.async while the row before it is still worked on, stays in the ring for both walks
(maximum and sum, then the result), and each stage that the second walk leaves is filled with the row after. A thread
copies what it reads itself, so stages need no barriers.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from onepass.core import device
from onepass.core.gluon_functions import async_load, commit_group, exp, wait_group
from onepass.core.triton_backend import Launcher, aligned, multiprocessors, shared_memory
from onepass.ops.softmax.triton.config import RING, VECTOR_BYTES


@gluon.jit
def _fetch(x_ptr, ring, slot, row, rows, columns, stride_x, col, EVEN: gl.constexpr):
    """Starts the copy of a stage; a group even where there is no such row, since groups are counted."""
    source = x_ptr + row * stride_x + col
    if EVEN:
        if row < rows:
            async_load(ring.index(slot), source)
    else:
        async_load(ring.index(slot), source, mask=(col < columns) & (row < rows))
    commit_group()


@gluon.jit
def _ring_fwd_kernel(
    x_ptr, y_ptr, rows, columns, stride_x,
    BLOCK_COLS: gl.constexpr, VECTOR: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    LANES: gl.constexpr = BLOCK_COLS // VECTOR
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32, 1], [WARPS, 1], [1, 0])
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    unswizzled: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, 1, 1, [1, 0])
    ring = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, LANES, VECTOR], unswizzled)
    at = gl.arange(0, LANES, lanes)[:, None] * VECTOR + gl.arange(0, VECTOR, gl.SliceLayout(0, layout))[None, :]
    programs = gl.num_programs(0)
    row = gl.program_id(0).to(gl.int64)
    for n in gl.static_range(STAGES):
        ahead = row + n // STEPS * programs
        _fetch(x_ptr, ring, n, ahead, rows, columns, stride_x, n % STEPS * BLOCK_COLS + at, EVEN)
    slot = 0
    while row < rows:
        largest = gl.full([LANES], -float("inf"), gl.float32, lanes)
        total = gl.zeros([LANES], gl.float32, lanes)
        reading = slot
        for step in gl.static_range(STEPS):
            wait_group(STAGES - 1 - step)
            x = ring.index(reading).load(layout)
            if not EVEN:
                x = gl.where(step * BLOCK_COLS + at < columns, x, -float("inf"))
            before = largest
            largest = gl.maximum(largest, gl.max(x, 1).to(gl.float32))
            shift = gl.where(largest == -float("inf"), 0.0, largest)
            total = total * exp(before - shift) + gl.sum(exp(x.to(gl.float32) - shift[:, None]), 1)
            reading = gl.where(reading == STAGES - 1, 0, reading + 1)
        top = gl.max(largest, 0)
        top = gl.where(top == -float("inf"), 0.0, top)
        inverse = 1.0 / gl.sum(total * exp(largest - top), 0)
        for step in gl.static_range(STEPS):
            col = step * BLOCK_COLS + at
            x = ring.index(slot).load(layout).to(gl.float32)
            y = (exp(x - top) * inverse).to(y_ptr.dtype.element_ty)
            if EVEN:
                gl.store(y_ptr + row * columns + col, y)
            else:
                gl.store(y_ptr + row * columns + col, y, mask=col < columns)
            ahead = row + (step + STAGES) // STEPS * programs
            next_col = (step + STAGES) % STEPS * BLOCK_COLS + at
            _fetch(x_ptr, ring, slot, ahead, rows, columns, stride_x, next_col, EVEN)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        row += programs
    wait_group(0)


_ring_fwd = Launcher(_ring_fwd_kernel, targets="cuda")


def takes(x: Tensor) -> bool:
    """Whether rows x (rows, columns) go through the ring: 16-byte copies, a row and its successor in shared memory."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    return (
        x.shape[1] % 16 == 0
        and x.shape[1] * x.itemsize <= RING.most_bytes
        and x.stride(0) % 16 == 0
        and aligned(x.data_ptr())
        and shared_memory(device.arch(x)) >= RING.stage_bytes * RING.stages
    )


def forward(x: Tensor, y: Tensor) -> None:
    """y of rows x (rows, columns) that `takes` has said yes to."""
    rows, columns = x.shape
    block_cols = RING.stage_bytes // x.itemsize
    _ring_fwd.launch(
        (min(rows, multiprocessors(x.device)), 1, 1),
        x.device,
        (x, y, rows, columns, x.stride(0)),
        {
            "BLOCK_COLS": block_cols,
            "VECTOR": VECTOR_BYTES // x.itemsize,
            "STEPS": triton.cdiv(columns, block_cols),
            "STAGES": RING.stages,
            "EVEN": columns % block_cols == 0,
            "WARPS": RING.num_warps,
        },
        num_warps=RING.num_warps,
    )
