"""rms_norm and layer_norm on GPUs, forward.

Rows up to 16384 columns are held in registers: read once, written once. Wider rows are walked twice, first for their
statistics and then to be normalised; the second walk finds them in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows, empty_rows
from onepass.core.triton_backend import Launcher
from onepass.ops.norm.spec import statistics_dtype, sum_dtype
from onepass.ops.norm.triton.config import forward_config


@triton.jit
def _affine(y, weight_ptr, bias_ptr, cols, mask, offset, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _rows_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    rows, columns, stride_x, stride_residual, eps, offset,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < columns)
    z = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + row * stride_residual + col, mask=mask, other=0.0).to(tl.float32)
        rounded = z.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + row * columns + col, rounded, mask=mask)
        z = rounded.to(tl.float32)
    if CENTER:
        mean = tl.sum(z, 1, keep_dims=True) / columns
        z = tl.where(mask, z - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, 1, keep_dims=True) / columns + eps)
    y = _affine(z * rstd, weight_ptr, bias_ptr, col, col < columns, offset, HAS_WEIGHT, HAS_BIAS)
    tl.store(y_ptr + row * columns + col, y.to(y_ptr.dtype.element_ty), mask=mask)
    if STATISTICS:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        if CENTER:
            tl.store(mean_ptr + row, mean, mask=row < rows)


@triton.jit
def _wide_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    rows, columns, stride_x, stride_residual, eps, offset,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    residual_ptr += row * stride_residual
    y_ptr += row * columns
    residual_out_ptr += row * columns
    # Each lane keeps the mean and the squared deviations of the columns that it has seen (Welford 1962).
    lane_mean = tl.zeros((BLOCK_COLS,), tl.float32)
    lane_square = tl.zeros((BLOCK_COLS,), tl.float32)
    steps = 0
    for start in tl.range(0, columns, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = col < columns
        z = tl.load(x_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            z += tl.load(residual_ptr + col, mask=mask, other=0.0).to(tl.float32)
            rounded = z.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + col, rounded, mask=mask)
            z = rounded.to(tl.float32)
        if CENTER:
            steps += 1
            deviation = tl.where(mask, z - lane_mean, 0.0)
            lane_mean += deviation / steps
            lane_square += deviation * (z - lane_mean)
        else:
            lane_square += z * z
    if CENTER:
        lane = tl.arange(0, BLOCK_COLS)
        count = (columns - lane + BLOCK_COLS - 1) // BLOCK_COLS  # columns that the lane has seen
        mean = tl.sum(lane_mean * count, 0) / columns
        between = lane_mean - mean
        variance = tl.sum(lane_square + count * between * between, 0) / columns
    else:
        mean = 0.0
        variance = tl.sum(lane_square, 0) / columns
    rstd = tl.rsqrt(variance + eps)
    if STATISTICS:
        tl.store(rstd_ptr + row, rstd)
        if CENTER:
            tl.store(mean_ptr + row, mean)
    for start in tl.range(0, columns, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = col < columns
        if HAS_RESIDUAL:
            z = tl.load(residual_out_ptr + col, mask=mask, other=0.0).to(tl.float32)
        else:
            z = tl.load(x_ptr + col, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = _affine((z - mean) * rstd, weight_ptr, bias_ptr, col, mask, offset, HAS_WEIGHT, HAS_BIAS)
        tl.store(y_ptr + col, y.to(y_ptr.dtype.element_ty), mask=mask)


_rows_fwd = Launcher(_rows_fwd_kernel)
_wide_fwd = Launcher(_wide_fwd_kernel)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, residual_out, mean, rstd as registration.py has them; None for what is not asked for."""
    columns = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = None if residual is None else torch.empty(x.shape, dtype=sum_dtype(x, residual), device=x.device)
    mean = empty_rows(x, statistics_dtype(x.dtype)) if statistics and center else None
    rstd = empty_rows(x, statistics_dtype(x.dtype)) if statistics else None
    rows = x.numel() // columns
    if rows:
        config = forward_config(columns)
        x_rows = as_rows(x)
        residual_rows = None if residual is None else as_rows(residual)
        kernel = _rows_fwd if config.block_cols >= columns else _wide_fwd
        kernel(
            (triton.cdiv(rows, config.block_rows), 1, 1),
            x.device,
            (
                x_rows,
                x_rows if residual_rows is None else residual_rows,
                weight,
                None if bias is None else bias,
                y,
                y if residual_out is None else residual_out,
                mean,
                rstd,
                rows,
                columns,
                x_rows.stride(0),
                0 if residual_rows is None else residual_rows.stride(0),
                eps,
                offset,
            ),
            {
                "CENTER": center,
                "HAS_RESIDUAL": residual is not None,
                "HAS_WEIGHT": weight is not None,
                "HAS_BIAS": bias is not None,
                "STATISTICS": statistics,
                "BLOCK_ROWS": config.block_rows,
                "BLOCK_COLS": config.block_cols,
            },
            num_warps=config.num_warps,
        )
    if not statistics:
        return y, residual_out, None, None
    return y, x.new_empty(0) if residual_out is None else residual_out, x.new_empty(0) if mean is None else mean, rstd
