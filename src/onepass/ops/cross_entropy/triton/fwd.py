"""Cross-entropy on GPUs, forward: logits are read once.

Short rows are a tile in registers; a wide one is walked by a program with the running maximum and sum (online softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher
from onepass.core.triton_functions import by_lane, exp, online_softmax_end, online_softmax_step, tanh
from onepass.ops.cross_entropy.triton.config import FORWARD_WIDE, VECTOR_BYTES, forward_rows


@triton.jit
def _loss(lse, picked, sum_x, classes, counted, valid, label_smoothing, z_loss, SMOOTHING: tl.constexpr):
    loss = lse - (1.0 - label_smoothing) * picked + z_loss * lse * lse
    if SMOOTHING:
        loss -= label_smoothing * (sum_x / classes)
    return tl.where(counted, tl.where(valid, loss, float("nan")), 0.0)


@triton.jit
def _rows_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, rows, classes, stride_logits,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, NEED_LSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    x_ptr = logits_ptr + row * stride_logits
    picked = tl.load(x_ptr + target, mask=exists & counted & valid, other=0.0).to(tl.float32)
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = exists[:, None] & (col < classes)
    x = tl.load(x_ptr[:, None] + col, mask=mask, other=-float("inf")).to(tl.float32)
    if SOFTCAP:
        x = tl.where(mask, softcap * tanh(x / softcap), -float("inf"))
        picked = softcap * tanh(picked / softcap)
    top = tl.max(x, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    lse = top + tl.log(tl.sum(exp(x - top[:, None]), 1))
    sum_x = tl.sum(tl.where(mask, x, 0.0), 1) if SMOOTHING else lse
    loss = _loss(lse, picked, sum_x, classes, counted, valid, label_smoothing, z_loss, SMOOTHING)
    tl.store(loss_ptr + row, loss, mask=exists)
    if NEED_LSE:
        tl.store(lse_ptr + row, lse, mask=exists)


@triton.jit
def wide_row(
    x_ptr, target, counted, classes, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """loss and lse of a row that is walked in steps."""
    valid = (target >= 0) & (target < classes)
    # Asked for now, needed last.
    picked = tl.load(x_ptr + target, mask=counted & valid, other=0.0).to(tl.float32)
    largest = tl.full((LANES,), -float("inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    lane_x = tl.zeros((LANES,), tl.float32)
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)
        mask = col < classes
        x = tl.load(x_ptr + col, mask=mask, other=-float("inf")).to(tl.float32)
        if SOFTCAP:
            x = tl.where(mask, softcap * tanh(x / softcap), -float("inf"))
        if SMOOTHING:
            lane_x += tl.sum(tl.sum(by_lane(tl.where(mask, x, 0.0), LANES, VECTOR), 2), 0)
        largest, total = online_softmax_step(x, largest, total, VECTOR)
    top, total_all = online_softmax_end(largest, total)
    lse = top + tl.log(total_all)
    if SOFTCAP:
        picked = softcap * tanh(picked / softcap)
    sum_x = tl.sum(lane_x, 0)
    return _loss(lse, picked, sum_x, classes, counted, valid, label_smoothing, z_loss, SMOOTHING), lse


@triton.jit
def _wide_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, rows, classes, stride_logits,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, NEED_LSE: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    loss, lse = wide_row(
        logits_ptr + row * stride_logits, target, target != ignore_index, classes, label_smoothing, z_loss, softcap,
        SMOOTHING, SOFTCAP, BLOCK, LANES, VECTOR, STAGES,
    )  # fmt: skip
    tl.store(loss_ptr + row, loss)
    if NEED_LSE:
        tl.store(lse_ptr + row, lse)


_rows_fwd = Launcher(_rows_fwd_kernel)
_wide_fwd = Launcher(_wide_fwd_kernel)


def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """loss and lse of each row, fp32; lse is empty where it is not needed."""
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows if need_lse else 0, dtype=torch.float32, device=logits.device)
    if not rows:
        return loss, lse
    x = as_rows(logits)
    arguments = (
        x, target.contiguous(), loss, lse if need_lse else None, rows, classes, x.stride(0),
        ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    options = {"SMOOTHING": label_smoothing != 0, "SOFTCAP": softcap != 0, "NEED_LSE": need_lse}
    if (tile := forward_rows(classes)) is not None:
        cut = {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols}
        programs = triton.cdiv(rows, tile.block_rows)
        _rows_fwd.launch((programs, 1, 1), x.device, arguments, options | cut, num_warps=tile.num_warps)
    else:
        wide = FORWARD_WIDE
        cut = {
            "BLOCK": wide.block_cols,
            "LANES": 32 * wide.num_warps,
            "VECTOR": VECTOR_BYTES // x.itemsize,
            "STAGES": wide.stages,
        }
        _wide_fwd.launch((rows, 1, 1), x.device, arguments, options | cut, num_warps=wide.num_warps)
    return loss, lse
