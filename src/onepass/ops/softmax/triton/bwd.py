"""softmax on GPUs, backward: dx = y * (dy - sum(dy * y)), cut as the forward is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher, multiprocessors
from onepass.ops.softmax.triton.config import backward_config


@triton.jit
def _rows_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, rows, columns, stride_dy, stride_y, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < columns)
    dy = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * stride_y + col, mask=mask, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, 1, keep_dims=True))
    tl.store(dx_ptr + row * columns + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wide_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, rows, columns, stride_dy, stride_y, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for row_32 in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row_32
        lane_sum = tl.zeros((BLOCK_COLS,), tl.float32)
        for start in tl.range(0, columns, BLOCK_COLS, num_stages=STAGES):
            col = start + tl.arange(0, BLOCK_COLS)
            mask = col < columns
            dy = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0, eviction_policy="evict_last")
            y = tl.load(y_ptr + row * stride_y + col, mask=mask, other=0.0, eviction_policy="evict_last")
            lane_sum += dy.to(tl.float32) * y.to(tl.float32)
        total = tl.sum(lane_sum, 0)
        for start in tl.range(0, columns, BLOCK_COLS, num_stages=STAGES):
            col = start + tl.arange(0, BLOCK_COLS)
            mask = col < columns
            dy = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0, eviction_policy="evict_first")
            y = tl.load(y_ptr + row * stride_y + col, mask=mask, other=0.0, eviction_policy="evict_first")
            dx = y.to(tl.float32) * (dy.to(tl.float32) - total)
            tl.store(dx_ptr + row * columns + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


_rows_bwd = Launcher(_rows_bwd_kernel)
_wide_bwd = Launcher(_wide_bwd_kernel)


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx in y's shape and dtype, contiguous."""
    columns = y.shape[-1]
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rows = y.numel() // columns
    if not rows:
        return dx
    config = backward_config(columns)
    dy_rows, y_rows = as_rows(dy), as_rows(y)
    arguments = (dy_rows, y_rows, dx, rows, columns, dy_rows.stride(0), y_rows.stride(0))
    if config.block_cols >= columns:
        _rows_bwd.launch(
            (triton.cdiv(rows, config.block_rows), 1, 1),
            y.device,
            arguments,
            {"BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_cols},
            num_warps=config.num_warps,
        )
    else:
        programs = config.programs_per_processor * multiprocessors(y.device) or rows
        _wide_bwd.launch(
            (min(rows, programs), 1, 1),
            y.device,
            arguments,
            {"BLOCK_COLS": config.block_cols, "STAGES": config.stages},
            num_warps=config.num_warps,
        )
    return dx
