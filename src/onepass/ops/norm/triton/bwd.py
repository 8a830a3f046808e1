"""rms_norm and layer_norm on GPUs, backward.

Programs go through the rows with what they add to dweight and dbias in registers, leave it as one partial each, and a
second kernel adds the partials in order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher, multiprocessors
from onepass.ops.norm.triton.config import backward_config

# Row blocks a program of the wide kernels goes through for one block of columns.
_WIDE_ROW_SPLITS = 8


@triton.jit
def _rows_bwd_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, columns, stride_dy, stride_dresidual, stride_x, offset,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_COLS)[None, :]
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + col, mask=col < columns, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
        mask = (row < rows) & (col < columns)
        xhat = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if CENTER:
            xhat = tl.where(mask, xhat - tl.load(mean_ptr + row, mask=row < rows, other=0.0), 0.0)
        xhat *= rstd
        if NEED_DWEIGHT:
            dweight += g * xhat
        if NEED_DBIAS:
            dbias += g
        if NEED_DX:
            if HAS_WEIGHT:
                g *= scale
            dx = g - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / columns)
            if CENTER:
                dx -= tl.sum(g, 1, keep_dims=True) / columns
            dx *= rstd
            if HAS_DRESIDUAL:
                dx += tl.load(dresidual_ptr + row * stride_dresidual + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * columns + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = program.to(tl.int64) * columns + tl.arange(0, BLOCK_COLS)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK_COLS) < columns)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=tl.arange(0, BLOCK_COLS) < columns)


@triton.jit
def _wide_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, columns, stride_dy, stride_x, offset,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """sums (rows, 2): the means of g * xhat and of g over a row."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTER else 0.0
    sum_gx = tl.zeros((BLOCK_COLS,), tl.float32)
    sum_g = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in tl.range(0, columns, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = col < columns
        x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32) + offset
        sum_gx += g * ((x - mean) * rstd)
        sum_g += g
    tl.store(sums_ptr + row * 2, tl.sum(sum_gx, 0) / columns)
    tl.store(sums_ptr + row * 2 + 1, tl.sum(sum_g, 0) / columns)


@triton.jit
def _wide_bwd_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, columns, stride_dy, stride_dresidual, stride_x, offset,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One block of columns of every n-th row."""
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = col < columns
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK_COLS,), tl.float32)
    dbias = tl.zeros((BLOCK_COLS,), tl.float32)
    for row_32 in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row_32
        rstd = tl.load(rstd_ptr + row)
        mean = tl.load(mean_ptr + row) if CENTER else 0.0
        xhat = (tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        if NEED_DWEIGHT:
            dweight += g * xhat
        if NEED_DBIAS:
            dbias += g
        if NEED_DX:
            if HAS_WEIGHT:
                g *= scale
            dx = g - xhat * tl.load(sums_ptr + row * 2)
            if CENTER:
                dx -= tl.load(sums_ptr + row * 2 + 1)
            dx *= rstd
            if HAS_DRESIDUAL:
                dx += tl.load(dresidual_ptr + row * stride_dresidual + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * columns + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * columns + col
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, dweight, mask=mask)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, dbias, mask=mask)


@triton.jit
def _add_partials_kernel(
    dweight_parts_ptr, dbias_parts_ptr, dweight_ptr, dbias_ptr, parts, columns,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    dweight = tl.zeros((BLOCK_PARTS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_PARTS, BLOCK_COLS), tl.float32)
    for start in tl.range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        mask = (part < parts) & (col < columns)
        at = part.to(tl.int64) * columns + col
        if NEED_DWEIGHT:
            dweight += tl.load(dweight_parts_ptr + at, mask=mask, other=0.0)
        if NEED_DBIAS:
            dbias += tl.load(dbias_parts_ptr + at, mask=mask, other=0.0)
    out = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + out, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=out < columns)
    if NEED_DBIAS:
        tl.store(dbias_ptr + out, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=out < columns)


_rows_bwd = Launcher(_rows_bwd_kernel)
_wide_sums = Launcher(_wide_sums_kernel)
_wide_bwd = Launcher(_wide_bwd_kernel)
_add_partials = Launcher(_add_partials_kernel)


def backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    center: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; empty where not needed."""
    need_dweight, need_dbias = need_dweight and weight is not None, need_dbias and bias is not None
    columns = x.shape[-1]
    rows = x.numel() // columns
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    make = torch.empty if rows else torch.zeros
    dweight = (
        make(columns, dtype=weight.dtype, device=x.device) if need_dweight and weight is not None else dx.new_empty(0)
    )
    dbias = make(columns, dtype=bias.dtype, device=x.device) if need_dbias and bias is not None else dx.new_empty(0)
    if not rows or not (need_dx or need_dweight or need_dbias):
        return dx, dweight, dbias
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dresidual_rows = None if dresidual is None else as_rows(dresidual)
    constants = {
        "CENTER": center,
        "HAS_WEIGHT": weight is not None,
        "HAS_DRESIDUAL": dresidual is not None,
        "NEED_DX": need_dx,
        "NEED_DWEIGHT": need_dweight,
        "NEED_DBIAS": need_dbias,
    }
    config = backward_config(columns)
    whole = config.block_cols >= columns
    blocks = triton.cdiv(rows, config.block_rows)
    programs = min(blocks, 2 * multiprocessors(x.device)) if whole else min(rows, _WIDE_ROW_SPLITS)
    partials = [
        torch.empty((programs, columns) if needed else 0, dtype=torch.float32, device=x.device)
        for needed in (need_dweight, need_dbias)
    ]
    rest = (
        rows,
        columns,
        dy_rows.stride(0),
        0 if dresidual_rows is None else dresidual_rows.stride(0),
        x_rows.stride(0),
        offset,
    )
    if whole:
        _rows_bwd(
            (programs, 1, 1),
            x.device,
            (dy_rows, dresidual_rows, x_rows, weight, mean, rstd, dx, *partials, *rest),
            {**constants, "BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_cols},
            num_warps=config.num_warps,
        )
    else:
        sums = torch.empty((rows, 2) if need_dx else 0, dtype=torch.float32, device=x.device)
        if need_dx:
            _wide_sums(
                (rows, 1, 1),
                x.device,
                (dy_rows, x_rows, weight, mean, rstd, sums, columns, dy_rows.stride(0), x_rows.stride(0), offset),
                {"CENTER": center, "HAS_WEIGHT": weight is not None, "BLOCK_COLS": config.block_cols},
                num_warps=config.num_warps,
            )
        _wide_bwd(
            (programs, triton.cdiv(columns, 1024), 1),
            x.device,
            (dy_rows, dresidual_rows, x_rows, weight, mean, rstd, sums, dx, *partials, *rest),
            {**constants, "BLOCK_COLS": 1024},
            num_warps=4,
        )
    if need_dweight or need_dbias:
        _add_partials(
            (triton.cdiv(columns, 64), 1, 1),
            x.device,
            (*partials, dweight, dbias, programs, columns),
            {"NEED_DWEIGHT": need_dweight, "NEED_DBIAS": need_dbias, "BLOCK_PARTS": 32, "BLOCK_COLS": 64},
            num_warps=4,
        )
    return dx, dweight, dbias
