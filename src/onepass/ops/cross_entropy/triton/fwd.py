"""Cross-entropy on GPUs, forward: a program walks its rows once, with the running maximum and sum (online softmax)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher
from onepass.ops.cross_entropy.triton.config import forward_config
from onepass.ops.cross_entropy.triton.softcap import tanh


@triton.jit
def _fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, rows, classes, stride_logits,
    ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0)
    x_ptr = logits_ptr + row * stride_logits
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    # Asked for now, needed last.
    picked = tl.load(x_ptr + target, mask=exists & counted & valid, other=0.0).to(tl.float32)
    largest = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    # Sums stay apart in their lanes until the end: a step needs one reduction, of the maximum.
    lane_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    lane_x = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in tl.range(0, classes, BLOCK_COLS, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK_COLS)[None, :]
        mask = exists[:, None] & (col < classes)
        x = tl.load(x_ptr[:, None] + col, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
        if SOFTCAP:
            x = tl.where(mask, softcap * tanh(x / softcap), -float("inf"))
        if SMOOTHING:
            lane_x += tl.where(mask, x, 0.0)
        before = largest
        largest = tl.maximum(largest, tl.max(x, 1))
        shift = tl.where(largest == -float("inf"), 0.0, largest)  # nothing but -inf so far: all terms are 0
        lane_sum = lane_sum * tl.exp(before - shift)[:, None] + tl.exp(x - shift[:, None])
    lse = tl.where(largest == -float("inf"), 0.0, largest) + tl.log(tl.sum(lane_sum, 1))
    if SOFTCAP:
        picked = softcap * tanh(picked / softcap)
    loss = lse - (1.0 - label_smoothing) * picked + z_loss * lse * lse
    if SMOOTHING:
        loss -= label_smoothing * (tl.sum(lane_x, 1) / classes)
    loss = tl.where(counted, tl.where(valid, loss, float("nan")), 0.0)
    tl.store(loss_ptr + row, loss, mask=exists)
    tl.store(lse_ptr + row, lse, mask=exists)


_fwd = Launcher(_fwd_kernel)


def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """loss and lse of each row, fp32."""
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return loss, lse
    config = forward_config(classes)
    x = as_rows(logits)
    _fwd.launch(
        (triton.cdiv(rows, config.block_rows), 1, 1),
        logits.device,
        (
            x,
            target.contiguous(),
            loss,
            lse,
            rows,
            classes,
            x.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
        ),
        {
            "SMOOTHING": label_smoothing != 0,
            "SOFTCAP": softcap != 0,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLS": config.block_cols,
            "STAGES": config.stages,
        },
        num_warps=config.num_warps,
    )
    return loss, lse
