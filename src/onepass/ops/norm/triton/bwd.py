"""rms_norm and layer_norm on GPUs, backward.

Programs go through the rows with what they add to dweight and dbias in registers, leave it as one partial each, and a
second kernel adds the partials in order: no atomics, the same bits every time. A row wider than a tile is shared by a
group of programs, each with its own columns, which tell each other their sums through memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core import device
from onepass.core.rows import as_row, as_rows
from onepass.core.triton_backend import Launcher, interpreted, multiprocessors, shared_memory
from onepass.core.triton_functions import collect, load, start_exchange, store, tell, ticket
from onepass.ops.norm.triton.config import (
    BACKWARD_WIDE,
    BACKWARD_WIDE_PROGRAMS_PER_SM,
    LARGEST_TILE,
    RowsConfig,
    backward_rows,
    partials_block,
)


@triton.jit
def _rows_bwd_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, columns, stride_dy, stride_dresidual, stride_x, offset,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_COLS)[None, :]
    if HAS_WEIGHT:
        scale = load(weight_ptr + col, col < columns, EVEN) + offset
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    # Staged: the next tiles travel to shared memory while this one is worked on.
    for start in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
        mask = (row < rows) & (col < columns)
        xhat = load(x_ptr + row * stride_x + col, mask, EVEN)
        g = load(dy_ptr + row * stride_dy + col, mask, EVEN)
        rstd = load(rstd_ptr + row, row < rows, EVEN)
        if CENTER:
            xhat -= load(mean_ptr + row, row < rows, EVEN)
            if not EVEN:
                xhat = tl.where(mask, xhat, 0.0)
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
                dx += load(dresidual_ptr + row * stride_dresidual + col, mask, EVEN)
            store(dx_ptr + row * columns + col, dx, mask, EVEN)
    partial = program.to(tl.int64) * columns + tl.arange(0, BLOCK_COLS)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK_COLS) < columns)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=tl.arange(0, BLOCK_COLS) < columns)


@triton.jit
def _load_row(ptr, row, rows, stride, col, mask):
    return tl.load(ptr + row * stride + col, mask=mask & (row < rows), other=0.0)


@triton.jit
def _scaled(g, scale, HAS_WEIGHT: tl.constexpr):
    g = g.to(tl.float32)
    if HAS_WEIGHT:
        g *= scale
    return g


@triton.jit
def _normalised(x, row, rows, mask, mean_ptr, rstd_ptr, CENTER: tl.constexpr):
    xhat = x.to(tl.float32)
    if CENTER:
        xhat = tl.where(mask, xhat - tl.load(mean_ptr + row, mask=row < rows, other=0.0), 0.0)
    return xhat * tl.load(rstd_ptr + row, mask=row < rows, other=0.0)


@triton.jit
def _wide_bwd_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, exchange_ptr,
    rows, columns, stride_dy, stride_dresidual, stride_x, offset, groups, members,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_COLS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    program = ticket(exchange_ptr)
    member, group = program % members, program // members
    col = member * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = col < columns
    scale = tl.full((BLOCK_COLS,), 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK_COLS,), tl.float32)
    dbias = tl.zeros((BLOCK_COLS,), tl.float32)
    row = tl.full((), 0, tl.int64) + group
    # Three rows are under way: this one waits for the others' sums, the next one's sums are told, the third is loading.
    x, g = _load_row(x_ptr, row, rows, stride_x, col, mask), _load_row(dy_ptr, row, rows, stride_dy, col, mask)
    after = row + groups
    next_x = _load_row(x_ptr, after, rows, stride_x, col, mask)
    next_g = _load_row(dy_ptr, after, rows, stride_dy, col, mask)
    if NEED_DX:
        wide = _scaled(g, scale, HAS_WEIGHT)
        xhat = _normalised(x, row, rows, mask, mean_ptr, rstd_ptr, CENTER)
        tell(exchange_ptr, row, rows, member, members, tl.sum(wide * xhat, 0), tl.sum(wide, 0))
    while row < rows:
        third = after + groups
        third_x = _load_row(x_ptr, third, rows, stride_x, col, mask)
        third_g = _load_row(dy_ptr, third, rows, stride_dy, col, mask)
        xhat = _normalised(x, row, rows, mask, mean_ptr, rstd_ptr, CENTER)
        if NEED_DWEIGHT:
            dweight += g.to(tl.float32) * xhat
        if NEED_DBIAS:
            dbias += g.to(tl.float32)
        if NEED_DX:
            wide = _scaled(next_g, scale, HAS_WEIGHT)
            next_xhat = _normalised(next_x, after, rows, mask, mean_ptr, rstd_ptr, CENTER)
            tell(exchange_ptr, after, rows, member, members, tl.sum(wide * next_xhat, 0), tl.sum(wide, 0))
            sum_gx, sum_g = collect(exchange_ptr, row, members, MEMBERS)
            dx = _scaled(g, scale, HAS_WEIGHT) - xhat * (sum_gx / columns)
            if CENTER:
                dx -= sum_g / columns
            dx *= tl.load(rstd_ptr + row)
            if HAS_DRESIDUAL:
                dx += tl.load(dresidual_ptr + row * stride_dresidual + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * columns + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        x, g = next_x, next_g
        next_x, next_g = third_x, third_g
        row, after = after, third
    partial = group.to(tl.int64) * columns + col
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
    x_rows, dy_rows, weight = as_rows(x), as_rows(dy), as_row(weight)
    dresidual_rows = None if dresidual is None else as_rows(dresidual)
    rows = x_rows.shape[0]
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    make = torch.empty if rows else torch.zeros
    dweight = make(columns if need_dweight else 0, dtype=x.dtype if weight is None else weight.dtype, device=x.device)
    dbias = make(columns if need_dbias else 0, dtype=x.dtype if bias is None else bias.dtype, device=x.device)
    if not rows or not (need_dx or need_dweight or need_dbias):
        return dx, dweight, dbias
    constants = {
        "CENTER": center,
        "HAS_WEIGHT": weight is not None,
        "HAS_DRESIDUAL": dresidual is not None,
        "NEED_DX": need_dx,
        "NEED_DWEIGHT": need_dweight,
        "NEED_DBIAS": need_dbias,
    }
    sms = multiprocessors(x.device)
    whole = columns <= LARGEST_TILE
    exchange = None
    if whole:
        config = backward_rows(columns)
        partials = programs = min(-(-rows // config.block_rows), config.programs_per_sm * sms)
        cut = {
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLS": config.block_cols,
            "STAGES": _stages(config, x_rows, dy_rows, dresidual_rows),
            "EVEN": rows % config.block_rows == 0 and columns == config.block_cols,
        }
        num_warps, more = config.num_warps, []
    else:
        block_cols = columns if interpreted(x.device) else BACKWARD_WIDE.block_cols  # programs run one after the other
        members = -(-columns // block_cols)
        partials = max(1, min(rows, BACKWARD_WIDE_PROGRAMS_PER_SM * sms // members))
        programs = partials * members
        exchange = start_exchange(rows, members, x.device)
        powers = [1 << (size - 1).bit_length() for size in (block_cols, members)]
        cut = dict(zip(("BLOCK_COLS", "MEMBERS"), powers, strict=True))
        num_warps, more = BACKWARD_WIDE.num_warps, [partials, members]
    parts = [
        torch.empty((partials, columns) if needed else 0, dtype=torch.float32, device=x.device)
        for needed in (need_dweight, need_dbias)
    ]
    tensors = (dy_rows, dresidual_rows, x_rows, weight, mean, rstd, dx, *parts, *(() if whole else (exchange,)))
    strides = dy_rows.stride(0), 0 if dresidual_rows is None else dresidual_rows.stride(0), x_rows.stride(0)
    arguments = (*tensors, rows, columns, *strides, offset, *more)
    kernel = _rows_bwd if whole else _wide_bwd
    kernel.launch((programs, 1, 1), x.device, arguments, constants | cut, num_warps=num_warps)
    if need_dweight or need_dbias:
        _add(parts, dweight, dbias, partials, columns, need_dweight, need_dbias)
    return dx, dweight, dbias


def _stages(config: RowsConfig, x: Tensor, dy: Tensor, dresidual: Tensor | None) -> int:
    """As many of the configuration's as shared memory holds, a tile of each tensor for every stage but the first."""
    tile = config.block_rows * config.block_cols * (x.itemsize + dy.itemsize)
    if dresidual is not None:
        tile += config.block_rows * config.block_cols * dresidual.itemsize
    return max(1, min(config.stages, 1 + (shared_memory(device.arch(x)) - 1024) // tile))


def _add(
    parts: list[Tensor],
    dweight: Tensor,
    dbias: Tensor,
    partials: int,
    columns: int,
    need_dweight: bool,
    need_dbias: bool,
) -> None:
    """dweight and dbias from their partials (partials, columns)."""
    block_parts, block_cols = partials_block(partials)
    _add_partials.launch(
        (-(-columns // block_cols), 1, 1),
        dweight.device,
        (*parts, dweight, dbias, partials, columns),
        {"NEED_DWEIGHT": need_dweight, "NEED_DBIAS": need_dbias, "BLOCK_PARTS": block_parts, "BLOCK_COLS": block_cols},
        num_warps=8,
    )
