"""softmax on GPUs, backward: dx = y * (dy - sum(dy * y)). A row wider than a tile is shared by a group of programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher, interpreted, multiprocessors
from onepass.core.triton_functions import collect, load, start_exchange, store, tell, ticket
from onepass.ops.softmax.triton.config import BACKWARD_WIDE, backward_config


@triton.jit
def _rows_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, rows, columns, stride_dy, stride_y,
    EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < columns)
    dy = load(dy_ptr + row * stride_dy + col, mask, EVEN)
    y = load(y_ptr + row * stride_y + col, mask, EVEN)
    dx = y * (dy - tl.sum(dy * y, 1, keep_dims=True))
    store(dx_ptr + row * columns + col, dx, mask, EVEN)


@triton.jit
def _load(ptr, row, rows, stride, col, mask):
    return tl.load(ptr + row * stride + col, mask=mask & (row < rows), other=0.0)


@triton.jit
def _tell_sum(exchange_ptr, row, rows, member, members, dy, y):
    total = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 0)
    tell(exchange_ptr, row, rows, member, members, total, total)


@triton.jit
def _shared_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, exchange_ptr, rows, columns, stride_dy, stride_y, groups, members,
    BLOCK_COLS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    program = ticket(exchange_ptr)
    member, group = program % members, program // members
    col = member * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = col < columns
    row = tl.full((), 0, tl.int64) + group
    # Three rows are under way: this one waits for the others' sums, the next one's sum is told, the third is loading.
    after = row + groups
    dy, y = _load(dy_ptr, row, rows, stride_dy, col, mask), _load(y_ptr, row, rows, stride_y, col, mask)
    next_dy, next_y = _load(dy_ptr, after, rows, stride_dy, col, mask), _load(y_ptr, after, rows, stride_y, col, mask)
    _tell_sum(exchange_ptr, row, rows, member, members, dy, y)
    while row < rows:
        third = after + groups
        third_dy = _load(dy_ptr, third, rows, stride_dy, col, mask)
        third_y = _load(y_ptr, third, rows, stride_y, col, mask)
        _tell_sum(exchange_ptr, after, rows, member, members, next_dy, next_y)
        total, _ = collect(exchange_ptr, row, members, MEMBERS)
        dx = y.to(tl.float32) * (dy.to(tl.float32) - total)
        tl.store(dx_ptr + row * columns + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dy, y = next_dy, next_y
        next_dy, next_y = third_dy, third_y
        row, after = after, third


_rows_bwd = Launcher(_rows_bwd_kernel)
_shared_bwd = Launcher(_shared_bwd_kernel)


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx in y's shape and dtype, contiguous."""
    columns = y.shape[-1]
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rows = y.numel() // columns
    if not rows:
        return dx
    config = backward_config(columns)
    dy_rows, y_rows = as_rows(dy), as_rows(y)
    strides = dy_rows.stride(0), y_rows.stride(0)
    if config is not None:
        _rows_bwd.launch(
            (triton.cdiv(rows, config.block_rows), 1, 1),
            y.device,
            (dy_rows, y_rows, dx, rows, columns, *strides),
            config.even(rows, columns) | {"BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_cols},
            num_warps=config.num_warps,
        )
        return dx
    block_cols = columns if interpreted(y.device) else BACKWARD_WIDE.block_cols  # programs run one after the other
    members = triton.cdiv(columns, block_cols)
    groups = max(1, min(rows, BACKWARD_WIDE.programs_per_processor * multiprocessors(y.device) // members))
    _shared_bwd.launch(
        (groups * members, 1, 1),
        y.device,
        (dy_rows, y_rows, dx, start_exchange(rows, members, y.device), rows, columns, *strides, groups, members),
        {"BLOCK_COLS": triton.next_power_of_2(block_cols), "MEMBERS": triton.next_power_of_2(members)},
        num_warps=BACKWARD_WIDE.num_warps,
    )
    return dx
