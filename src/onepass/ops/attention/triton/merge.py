"""merge_attention on GPUs: partial results over disjoint keys, weighted by exp(their lse - the whole lse)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.attention.triton.problem import block_of


@triton.jit
def _log_sum_exp(lses_ptr, at, parts, part_size, there):
    """The natural log-sum-exp over the parts of each row; -inf where no part saw a key."""
    largest = tl.full(at.shape, -float("inf"), tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    for part in range(0, parts):
        lse = tl.load(lses_ptr + part * part_size + at, mask=there, other=-float("inf"))
        before = largest
        largest = tl.maximum(largest, lse)
        top = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(before - top) + tl.exp(lse - top)
    top = tl.where(largest == -float("inf"), 0.0, largest)
    return tl.where(total == 0.0, -float("inf"), top + tl.log(total))


@triton.jit
def _part_weight(lse_part, lse):
    return tl.where(lse == -float("inf"), 0.0, tl.exp(lse_part - lse))


@triton.jit
def _fwd_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, parts, seqlen, nheads, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows are (batch, seqlen, nheads) in order; lses are (batch, nheads, seqlen)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    head, token = row % nheads, row // nheads
    at = (token // seqlen * nheads + head) * seqlen + token % seqlen
    lse = _log_sum_exp(lses_ptr, at, parts, rows, there)
    feature = tl.arange(0, BLOCK_D)[None, :]
    mask = there[:, None] & (feature < HEAD_DIM)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in range(0, parts):
        weight = _part_weight(tl.load(lses_ptr + part * rows + at, mask=there, other=-float("inf")), lse)[:, None]
        x = tl.load(outs_ptr + (part * rows + row)[:, None] * HEAD_DIM + feature, mask=mask, other=0.0)
        acc += tl.where(weight == 0.0, 0.0, weight * x.to(tl.float32))
    tl.store(out_ptr + row[:, None] * HEAD_DIM + feature, acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + at, lse, mask=there)


@triton.jit
def _bwd_kernel(
    do_ptr, dlse_ptr, outs_ptr, lses_ptr, out_ptr, lse_ptr, douts_ptr, dlses_ptr, parts, seqlen, nheads, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """douts = weight * do, dlses = weight * (do . (outs - out) + dlse)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    head, token = row % nheads, row // nheads
    at = (token // seqlen * nheads + head) * seqlen + token % seqlen
    lse = tl.load(lse_ptr + at, mask=there, other=-float("inf"))
    dlse = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + at, mask=there, other=0.0)
    feature = tl.arange(0, BLOCK_D)[None, :]
    mask = there[:, None] & (feature < HEAD_DIM)
    do = tl.load(do_ptr + row[:, None] * HEAD_DIM + feature, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + row[:, None] * HEAD_DIM + feature, mask=mask, other=0.0).to(tl.float32)
    for part in range(0, parts):
        weight = _part_weight(tl.load(lses_ptr + part * rows + at, mask=there, other=-float("inf")), lse)
        place = (part * rows + row)[:, None] * HEAD_DIM + feature
        x = tl.load(outs_ptr + place, mask=mask, other=0.0).to(tl.float32)
        along = tl.where(weight == 0.0, 0.0, weight * (tl.sum(do * (x - out), 1) + dlse))
        tl.store(douts_ptr + place, (weight[:, None] * do).to(douts_ptr.dtype.element_ty), mask=mask)
        tl.store(dlses_ptr + part * rows + at, along, mask=there)


_fwd = Launcher(_fwd_kernel)
_bwd = Launcher(_bwd_kernel)


def _cut(outs: Tensor) -> tuple[tuple[int, int, int, int], dict[str, int], int]:
    """(parts, seqlen, nheads, rows), the constants of a block, and the number of blocks."""
    parts, *batch, seqlen, nheads, head_dim = outs.shape
    rows = (batch[0] if batch else 1) * seqlen * nheads
    block_d = block_of(head_dim)
    block_m = max(1, 2048 // block_d)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    return (parts, seqlen, nheads, rows), constants | {"BLOCK_M": block_m}, triton.cdiv(rows, block_m)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse, contiguous."""
    outs, lses = outs.contiguous(), lses.contiguous()
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device)
    sizes, constants, programs = _cut(outs)
    if programs:
        _fwd.launch((programs, 1, 1), outs.device, (outs, lses, out, lse, *sizes), constants, num_warps=4)
    return out, lse


def merge_backward(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """douts and dlses, contiguous."""
    do, outs, lses, out, lse = (x.contiguous() for x in (do, outs, lses, out, lse))
    dlse = None if dlse is None else dlse.contiguous()
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    dlses = torch.empty(lses.shape, dtype=lses.dtype, device=lses.device)
    sizes, constants, programs = _cut(outs)
    if programs:
        block_m = constants.pop("BLOCK_M")
        arguments = (do, dlse, outs, lses, out, lse, douts, dlses, *sizes)
        constants |= {"HAS_DLSE": dlse is not None, "BLOCK_M": block_m}
        _bwd.launch((programs, 1, 1), outs.device, arguments, constants, num_warps=4)
    return douts, dlses
