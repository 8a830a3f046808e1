"""What the kernels of the backward need of each query: lse in log2 units and delta; and what it adds to the sink's
gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.attention.triton.problem import ROW_MULTIPLE, Problem, block_of
from onepass.ops.attention.triton.tile import LOG2_E, MOST_LSE


@triton.jit
def _delta_kernel(
    do_ptr, out_ptr, lse_ptr, dlse_ptr, sink_ptr, delta_ptr, lse2_ptr, sink_part_ptr,
    stride_db, stride_ds, stride_dh, stride_dd, stride_ob, stride_os, stride_oh, stride_od, stride_row,
    seqlen_q, nheads_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_DSINK: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta; lse in log2 units, +inf where a query sees no key, so that its weights are exp2(-inf) = 0.

    With a BIAS, an lse so large that no digit is left for weights is another such: they might be inf.
    """
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    sheet = tl.program_id(0) // blocks
    batch = (sheet // nheads_q).to(tl.int64)
    head = (sheet % nheads_q).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.arange(0, BLOCK_DV)[None, :]
    there = row < seqlen_q
    mask = there[:, None] & (feature < HEAD_DIM_V)
    do_ptrs = do_ptr + batch * stride_db + row[:, None] * stride_ds + head * stride_dh
    out_ptrs = out_ptr + batch * stride_ob + row[:, None] * stride_os + head * stride_oh
    do = tl.load(do_ptrs + feature.to(tl.int64) * stride_dd, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptrs + feature.to(tl.int64) * stride_od, mask=mask, other=0.0).to(tl.float32)
    at = sheet.to(tl.int64) * seqlen_q + row
    row_at = sheet.to(tl.int64) * stride_row + row
    delta = tl.sum(do * out, 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=there, other=0.0)
    lse = tl.load(lse_ptr + at, mask=there, other=0.0)
    empty = lse == -float("inf")
    delta = tl.where(empty, 0.0, delta)  # dlse of -inf may be anything
    tl.store(delta_ptr + row_at, delta, mask=there)
    lost = empty
    if BIAS:
        lost |= (tl.abs(lse) > MOST_LSE) & (lse < float("inf"))
    tl.store(lse2_ptr + row_at, tl.where(lost, float("inf"), lse * LOG2_E), mask=there)
    if NEED_DSINK:  # the sink has the weight exp(sink - lse) and adds no value
        sink = tl.load(sink_ptr + head).to(tl.float32)
        weight = tl.where(empty, 0.0, tl.exp(sink - lse))
        tl.store(sink_part_ptr + at, -weight * delta, mask=there)


_delta = Launcher(_delta_kernel)


def run(
    problem: Problem, do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, need_dsink: bool
) -> tuple[Tensor, Tensor | None]:
    """lse in log2 units and delta, as Held says; what each query adds to dsink, (batch, nheads_q, seqlen_q)."""
    batch, seqlen_q, nheads_q, _ = problem.q.shape
    head_dim_v = problem.v.shape[3]
    lse = lse.contiguous()
    length = triton.cdiv(lse.shape[2], ROW_MULTIPLE) * ROW_MULTIPLE
    rows = torch.empty((2, *lse.shape[:2], length), dtype=torch.float32, device=lse.device)
    sink_part = torch.empty_like(lse) if need_dsink else None
    block_m = 64 if head_dim_v <= 128 else 32
    programs = batch * nheads_q * triton.cdiv(seqlen_q, block_m)
    if programs:
        _delta.launch(
            (programs, 1, 1),
            do.device,
            (
                do, out, lse, None if dlse is None else dlse.contiguous(),
                problem.attn_sink.contiguous() if need_dsink and problem.attn_sink is not None else None,
                rows[1], rows[0], sink_part, *do.stride(), *out.stride(), length, seqlen_q, nheads_q,
            ),
            {
                "HEAD_DIM_V": head_dim_v,
                "BLOCK_DV": block_of(head_dim_v),
                "HAS_DLSE": dlse is not None,
                "NEED_DSINK": need_dsink,
                "BIAS": problem.attn_bias is not None,
                "BLOCK_M": block_m,
            },
            num_warps=4,
        )  # fmt: skip
    return rows, sink_part
