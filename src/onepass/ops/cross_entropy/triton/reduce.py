"""The rows' losses to one number, in a fixed order: one program, or partial sums and then one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.cross_entropy.triton.config import REDUCE


@triton.jit
def _finish(total, count, value_ptr, scale_ptr, MEAN: tl.constexpr, NEED_SCALE: tl.constexpr):
    if MEAN:
        tl.store(value_ptr, total / count)
        if NEED_SCALE:
            tl.store(scale_ptr, 1.0 / count)
    else:
        tl.store(value_ptr, total)


@triton.jit
def _rows_kernel(
    loss_ptr, target_ptr, totals_ptr, counts_ptr, scale_ptr, rows, ignore_index,
    MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, ONE_PROGRAM: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * SPAN
    for start in tl.range(0, SPAN, BLOCK):
        row = first + start + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + row, mask=row < rows, other=0.0)
        if MEAN:
            target = tl.load(target_ptr + row, mask=row < rows, other=0)
            count += tl.where((row < rows) & (target != ignore_index), 1, 0)
    if ONE_PROGRAM:
        _finish(tl.sum(total, 0), tl.sum(count, 0).to(tl.float32), totals_ptr, scale_ptr, MEAN, NEED_SCALE)
    else:
        tl.store(totals_ptr + tl.program_id(0), tl.sum(total, 0))
        tl.store(counts_ptr + tl.program_id(0), tl.sum(count, 0))


@triton.jit
def _partials_kernel(
    totals_ptr, counts_ptr, value_ptr, scale_ptr, partials,
    MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, partials, BLOCK):
        partial = start + tl.arange(0, BLOCK)
        total += tl.load(totals_ptr + partial, mask=partial < partials, other=0.0)
        count += tl.load(counts_ptr + partial, mask=partial < partials, other=0)
    _finish(tl.sum(total, 0), tl.sum(count, 0).to(tl.float32), value_ptr, scale_ptr, MEAN, NEED_SCALE)


_rows = Launcher(_rows_kernel)
_partials = Launcher(_partials_kernel)


def reduce(
    loss: Tensor, target: Tensor, ignore_index: int, mean: bool, need_scale: bool = True
) -> tuple[Tensor, Tensor]:
    """The rows' sum or mean, and 1 / counted rows (empty for the sum, and where it is not needed)."""
    rows, device = loss.shape[0], loss.device
    value = torch.empty((), dtype=torch.float32, device=device)
    need_scale = need_scale and mean
    scale = torch.empty(() if need_scale else (0,), dtype=torch.float32, device=device)
    programs = max(1, triton.cdiv(rows, REDUCE.rows_per_program))
    one = programs == 1
    totals = value if one else torch.empty(programs, dtype=torch.float32, device=device)
    counts = None if one else torch.empty(programs, dtype=torch.int32, device=device)
    _rows.launch(
        (programs, 1, 1),
        device,
        (loss, target.contiguous(), totals, counts, scale if need_scale else None, rows, ignore_index),
        {
            "MEAN": mean,
            "NEED_SCALE": need_scale,
            "ONE_PROGRAM": one,
            "SPAN": REDUCE.rows_per_program,
            "BLOCK": REDUCE.block,
        },
        num_warps=REDUCE.num_warps,
    )
    if not one:
        _partials.launch(
            (1, 1, 1),
            device,
            (totals, counts, value, scale if need_scale else None, programs),
            {"MEAN": mean, "NEED_SCALE": need_scale, "BLOCK": REDUCE.block},
            num_warps=REDUCE.num_warps,
        )
    return value, scale
