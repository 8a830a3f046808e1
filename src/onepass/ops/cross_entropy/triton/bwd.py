"""Cross-entropy on GPUs, backward: logits are read once, dlogits written once, everything else is one number a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher
from onepass.core.triton_functions import exp, tanh
from onepass.ops.cross_entropy.triton.config import backward_config


@triton.jit
def _bwd_kernel(
    dloss_ptr, dlse_ptr, logits_ptr, target_ptr, lse_ptr, dlogits_ptr,
    rows, columns, stride_dloss, stride_dlse, stride_logits, stride_dlogits, first_class, classes,
    ignore_index, label_smoothing, z_loss, softcap,
    HAS_DLSE: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    g = tl.load(dloss_ptr + row * stride_dloss, mask=exists, other=0.0)
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    g = tl.where(counted, tl.where(valid, g, float("nan")), 0.0)
    total = g * (1.0 + 2.0 * z_loss * lse)
    if HAS_DLSE:
        total += tl.load(dlse_ptr + row * stride_dlse, mask=exists, other=0.0)
    else:
        total = tl.where(counted, total, 0.0)
    hot = target - first_class
    hot_g = g * (1.0 - label_smoothing)
    smooth_g = g * label_smoothing / classes
    first = tl.program_id(1) * SPAN
    for start in tl.range(first, tl.minimum(first + SPAN, columns), BLOCK_COLS, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK_COLS)[None, :]
        mask = exists & (col < columns)
        # The logits of rows that nothing flows into are not read.
        read = mask if HAS_DLSE else mask & counted
        x = tl.load(logits_ptr + row * stride_logits + col, mask=read, other=0.0)
        x = x.to(tl.float32)
        if SOFTCAP:
            t = tanh(x / softcap)
            x = softcap * t
        dx = total * exp(x - lse) - tl.where(col == hot, hot_g, 0.0)
        if SMOOTHING:
            dx -= smooth_g
        if SOFTCAP:
            dx *= 1.0 - t * t
        if not HAS_DLSE:
            dx = tl.where(counted, dx, 0.0)
        tl.store(dlogits_ptr + row * stride_dlogits + col, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)


_bwd = Launcher(_bwd_kernel)


def backward(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int = 0,
    classes: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """dlogits in logits' dtype; for first_class, classes and out see reference.py."""
    rows, columns = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    if not rows:
        return dlogits
    config = backward_config(columns)
    span = config.columns_per_program or triton.cdiv(columns, config.block_cols) * config.block_cols
    x = as_rows(logits)
    _bwd.launch(
        (triton.cdiv(rows, config.block_rows), triton.cdiv(columns, span), 1),
        logits.device,
        (
            dloss,
            dlse,
            x,
            target.contiguous(),
            lse.contiguous(),
            dlogits,
            rows,
            columns,
            dloss.stride(0),
            0 if dlse is None else dlse.stride(0),
            x.stride(0),
            dlogits.stride(0),
            first_class,
            classes or columns,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
        ),
        {
            "HAS_DLSE": dlse is not None,
            "SMOOTHING": label_smoothing != 0,
            "SOFTCAP": softcap != 0,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLS": config.block_cols,
            "SPAN": span,
            "STAGES": config.stages,
        },
        num_warps=config.num_warps,
    )
    return dlogits
