"""rms_norm and layer_norm on GPUs, forward.

Rows up to 16384 columns are one tile in registers. Wider ones are held in registers too, step by step and in their own
dtype, as long as they fit (65536 columns of bf16): read once, written once. Beyond that, and sooner where it is faster,
a row is walked twice, first for its statistics and then to be normalised; the second walk finds it in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_row, as_rows, empty_rows
from onepass.core.triton_backend import Launcher, most_warps
from onepass.core.triton_functions import load, store, unlike
from onepass.ops.norm.spec import statistics_dtype, sum_dtype
from onepass.ops.norm.triton.config import FORWARD_WIDE, LARGEST_TILE, forward_held, forward_rereads, forward_rows


@triton.jit
def _over(total, columns):
    """total / columns, rounded correctly, so that the mean of equal values is that value and they come out as 0."""
    return tl.div_rn(total, tl.full(total.shape, 0.0, tl.float32) + columns)


@triton.jit
def _affine(
    y, weight_ptr, bias_ptr, cols, mask, offset,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    if HAS_WEIGHT:
        y *= load(weight_ptr + cols, mask, EVEN, "evict_last") + offset
    if HAS_BIAS:
        y += load(bias_ptr + cols, mask, EVEN, "evict_last")
    return y


@triton.jit(do_not_specialize=["rows"])
def _rows_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    rows, columns, stride_x, stride_residual, eps, offset, zero,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr, EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < columns)
    z = load(x_ptr + row * stride_x + col, mask, EVEN)
    if HAS_RESIDUAL:
        z += load(residual_ptr + row * stride_residual + col, mask, EVEN)
        rounded = z.to(residual_out_ptr.dtype.element_ty)
        store(residual_out_ptr + row * columns + col, rounded, mask, EVEN)
        z = rounded.to(tl.float32)
    if CENTER:
        mean = _over(tl.sum(z, 1, keep_dims=True), columns)
        z = z - mean if EVEN else tl.where(mask, z - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, 1, keep_dims=True) / columns + eps)
    y = _affine(z * rstd, weight_ptr, bias_ptr, col, col < columns, offset, HAS_WEIGHT, HAS_BIAS, EVEN)
    store(y_ptr + row * columns + col, y, mask, EVEN)
    if STATISTICS:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        if CENTER:
            tl.store(mean_ptr + row, mean, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _held_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    rows, columns, stride_x, stride_residual, eps, offset, zero,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr, EVEN: tl.constexpr, BLOCK_COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_COLS)
    lane_sum = tl.zeros((BLOCK_COLS,), tl.float32)
    lane_square = tl.zeros((BLOCK_COLS,), tl.float32)
    held = ()
    for step in tl.static_range(STEPS):
        col = step * BLOCK_COLS + lane
        mask = col < columns
        z = load(x_ptr + row * stride_x + col, mask, EVEN).to(x_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            r = load(residual_ptr + row * stride_residual + col, mask, EVEN)
            z = (z.to(tl.float32) + r).to(residual_out_ptr.dtype.element_ty)
            store(residual_out_ptr + row * columns + col, z, mask, EVEN)
        held = held + (z,)  # noqa: RUF005 (Triton knows no unpacking)
        wide = z.to(tl.float32)
        if CENTER:
            lane_sum += wide
        else:
            lane_square += wide * wide
    mean = 0.0
    if CENTER:
        mean = _over(tl.sum(lane_sum, 0), columns)
        for step in tl.static_range(STEPS):
            deviation = unlike(held[step], zero).to(tl.float32) - mean
            if not EVEN:
                deviation = tl.where(step * BLOCK_COLS + lane < columns, deviation, 0.0)
            lane_square += deviation * deviation
        zero &= mean.to(tl.int32, bitcast=True)  # still 0, and another one to the compiler
    rstd = tl.rsqrt(tl.sum(lane_square, 0) / columns + eps)
    if STATISTICS:
        tl.store(rstd_ptr + row, rstd)
        if CENTER:
            tl.store(mean_ptr + row, mean)
    for step in tl.static_range(STEPS):
        col = step * BLOCK_COLS + lane
        mask = col < columns
        z = unlike(held[step], zero).to(tl.float32)
        y = _affine((z - mean) * rstd, weight_ptr, bias_ptr, col, mask, offset, HAS_WEIGHT, HAS_BIAS, EVEN)
        store(y_ptr + row * columns + col, y, mask, EVEN)


@triton.jit(do_not_specialize=["rows"])
def _wide_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, mean_ptr, rstd_ptr,
    rows, columns, stride_x, stride_residual, eps, offset, zero,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr, EVEN: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # Each lane keeps the mean and the squared deviations of the columns that it has seen (Welford 1962).
    lane_mean = tl.zeros((BLOCK_COLS,), tl.float32)
    lane_square = tl.zeros((BLOCK_COLS,), tl.float32)
    steps = 0
    for start in tl.range(0, columns, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = col < columns
        z = load(x_ptr + row * stride_x + col, mask, EVEN, "evict_last")
        if HAS_RESIDUAL:
            z += load(residual_ptr + row * stride_residual + col, mask, EVEN)
            rounded = z.to(residual_out_ptr.dtype.element_ty)
            store(residual_out_ptr + row * columns + col, rounded, mask, EVEN)
            z = rounded.to(tl.float32)
        if CENTER:
            steps += 1
            deviation = z - lane_mean if EVEN else tl.where(mask, z - lane_mean, 0.0)
            lane_mean += deviation / steps
            lane_square += deviation * (z - lane_mean)
        else:
            lane_square += z * z
    if CENTER:
        lane = tl.arange(0, BLOCK_COLS)
        count = (columns - lane + BLOCK_COLS - 1) // BLOCK_COLS  # columns that the lane has seen
        mean = _over(tl.sum(lane_mean * count, 0), columns)
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
            z = load(residual_out_ptr + row * columns + col, mask, EVEN)
        else:
            z = load(x_ptr + row * stride_x + col, mask, EVEN, "evict_first")
        y = _affine((z - mean) * rstd, weight_ptr, bias_ptr, col, mask, offset, HAS_WEIGHT, HAS_BIAS, EVEN)
        store(y_ptr + row * columns + col, y, mask, EVEN)


_rows_fwd = Launcher(_rows_fwd_kernel)
_held_fwd = Launcher(_held_fwd_kernel)
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
    x_rows = as_rows(x)
    weight, bias = as_row(weight), as_row(bias)
    residual_rows = None if residual is None else as_rows(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = None
    if residual is not None:
        residual_out = torch.empty_like(y, dtype=sum_dtype(x, residual))
    mean = empty_rows(x, statistics_dtype(x.dtype)) if statistics and center else None
    rstd = empty_rows(x, statistics_dtype(x.dtype)) if statistics else None
    rows = x_rows.shape[0]
    if rows:
        _launch(x_rows, residual_rows, weight, bias, y, residual_out, mean, rstd, eps, offset, center)
    if not statistics:
        return y, residual_out, None, None
    return y, x.new_empty(0) if residual_out is None else residual_out, x.new_empty(0) if mean is None else mean, rstd


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    residual_out: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> None:
    rows, columns = x.shape
    stride_residual = 0 if residual is None else residual.stride(0)
    tensors = (x, residual, weight, bias, y, residual_out, mean, rstd)
    scalars = (rows, columns, x.stride(0), stride_residual, eps, offset, 0)
    rereads = residual is None and forward_rereads(columns, center)
    programs, block_rows = rows, 1
    if columns <= LARGEST_TILE and not rereads:
        config = forward_rows(columns, center)
        block_rows, block_cols, num_warps = config.block_rows, config.block_cols, config.num_warps
        kernel, programs = _rows_fwd, -(-rows // block_rows)
        cut = {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
    elif not rereads and (
        held := forward_held(columns, (residual_out if residual_out is not None else x).itemsize, center)
    ):
        block_cols, num_warps = held.block_cols, min(held.num_warps, most_warps(x.device))
        kernel, cut = _held_fwd, {"BLOCK_COLS": block_cols, "STEPS": -(-columns // block_cols)}
    else:
        block_cols, num_warps = FORWARD_WIDE.block_cols, FORWARD_WIDE.num_warps
        kernel, cut = _wide_fwd, {"BLOCK_COLS": block_cols}
    constants = {
        "CENTER": center,
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "STATISTICS": rstd is not None,
        "EVEN": rows % block_rows == 0 and columns % block_cols == 0,
    }
    kernel.launch((programs, 1, 1), x.device, (*tensors, *scalars), constants | cut, num_warps=num_warps)
