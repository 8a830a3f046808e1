"""softmax on GPUs, forward.

Rows that fit are held in registers: read once, written once. Wider rows go through shared memory where ring.py takes
them; else they are walked twice, first for their maximum and sum and then to be normalised. No more rows are in flight
than the cache holds, so the second walk stays out of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher, multiprocessors
from onepass.core.triton_functions import exp, online_softmax_end, online_softmax_step, unlike
from onepass.ops.softmax.triton import ring
from onepass.ops.softmax.triton.config import FORWARD_HELD, VECTOR_BYTES, forward_config, held, wide


@triton.jit
def _rows_fwd_kernel(
    x_ptr, y_ptr, rows, columns, stride_x,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < columns)
    # Not `load`: without masks this kernel is 2 % slower (H200, 4096 and 8192 columns).
    x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=-float("inf")).to(tl.float32)
    e = exp(x - tl.max(x, 1, keep_dims=True))
    y = e * (1.0 / tl.sum(e, 1, keep_dims=True))
    tl.store(y_ptr + row * columns + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wide_fwd_kernel(
    x_ptr, y_ptr, rows, columns, stride_x,
    BLOCK_COLS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for row_32 in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row_32
        largest = tl.full((LANES,), -float("inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in tl.range(0, columns, BLOCK_COLS, num_stages=STAGES):
            col = start + tl.arange(0, BLOCK_COLS)
            x = tl.load(
                x_ptr + row * stride_x + col, mask=col < columns, other=-float("inf"), eviction_policy="evict_last"
            )
            largest, total = online_softmax_step(x.to(tl.float32), largest, total, VECTOR)
        top, total_all = online_softmax_end(largest, total)
        inverse = 1.0 / total_all
        for start in tl.range(0, columns, BLOCK_COLS, num_stages=STAGES):
            col = start + tl.arange(0, BLOCK_COLS)
            mask = col < columns
            x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(
                tl.float32
            )
            y = exp(x - top) * inverse
            tl.store(y_ptr + row * columns + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _held_fwd_kernel(
    x_ptr, y_ptr, rows, columns, stride_x, zero, BLOCK_COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_COLS)
    largest = tl.full((BLOCK_COLS,), -float("inf"), tl.float32)
    held = ()
    for step in tl.static_range(STEPS):
        col = step * BLOCK_COLS + lane
        x = tl.load(x_ptr + row * stride_x + col, mask=col < columns, other=-float("inf"))
        held = held + (x,)  # noqa: RUF005 (Triton knows no unpacking)
        largest = tl.maximum(largest, x.to(tl.float32))
    top = tl.max(largest, 0)
    lane_sum = tl.zeros((BLOCK_COLS,), tl.float32)
    for step in tl.static_range(STEPS):
        lane_sum += exp(unlike(held[step], zero).to(tl.float32) - top)
    inverse = 1.0 / tl.sum(lane_sum, 0)
    zero &= inverse.to(tl.int32, bitcast=True)  # still 0, and another one to the compiler
    for step in tl.static_range(STEPS):
        col = step * BLOCK_COLS + lane
        y = exp(unlike(held[step], zero).to(tl.float32) - top) * inverse
        tl.store(y_ptr + row * columns + col, y.to(y_ptr.dtype.element_ty), mask=col < columns)


_rows_fwd = Launcher(_rows_fwd_kernel)
_held_fwd = Launcher(_held_fwd_kernel)
_wide_fwd = Launcher(_wide_fwd_kernel)


def forward(x: Tensor) -> Tensor:
    """y in x's shape and dtype, contiguous."""
    columns = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // columns
    if not rows:
        return y
    config = forward_config(columns)
    vector = VECTOR_BYTES // x.itemsize
    x_rows = as_rows(x)
    arguments = (x_rows, y, rows, columns, x_rows.stride(0))
    if config.block_cols >= columns:
        _rows_fwd.launch(
            (triton.cdiv(rows, config.block_rows), 1, 1),
            x.device,
            arguments,
            {"BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_cols},
            num_warps=config.num_warps,
        )
    elif wide(columns) and ring.takes(x_rows):
        ring.forward(x_rows, y)
    elif held(columns, x.itemsize):
        _held_fwd.launch(
            (rows, 1, 1),
            x.device,
            (*arguments, 0),
            {"BLOCK_COLS": FORWARD_HELD.block_cols, "STEPS": triton.cdiv(columns, FORWARD_HELD.block_cols)},
            num_warps=FORWARD_HELD.num_warps,
        )
    else:
        programs = config.programs_per_processor * multiprocessors(x.device) or rows
        _wide_fwd.launch(
            (min(rows, programs), 1, 1),
            x.device,
            arguments,
            {
                "BLOCK_COLS": config.block_cols,
                "LANES": 32 * config.num_warps,
                "VECTOR": vector,
                "STAGES": config.stages,
            },
            num_warps=config.num_warps,
        )
    return y
