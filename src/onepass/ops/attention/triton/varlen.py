"""attention_varlen on GPUs: the kernels of attention, which find their sequence in packed tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onepass.ops.attention.spec_varlen import check_varlen_contents
from onepass.ops.attention.triton import bwd, fwd
from onepass.ops.attention.triton.config import forward_config
from onepass.ops.attention.triton.problem import Packed, Problem


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    page_table: Tensor | None, attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None,
    key_mask: Tensor | None, rng_state: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float,
    window_left: int, window_right: int, bottom_right: bool, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (total_q, nheads_q, head_dim_v) and lse (nheads_q, total_q)."""
    packed = Packed(cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_q, max_seqlen_k)
    problem = _problem(
        packed, q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, softmax_scale, window_left,
        window_right, bottom_right, softcap, dropout_p,
    )  # fmt: skip
    out, lse = fwd.run(problem, forward_config(problem))
    return out.view(out.shape[1:]), lse.view(lse.shape[1:])


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, seqused_k: Tensor | None, attn_bias: Tensor | None, alibi_slopes: Tensor | None,
    attn_sink: Tensor | None, key_mask: Tensor | None, rng_state: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, window_left: int, window_right: int, bottom_right: bool, softcap: float, dropout_p: float,
    deterministic: bool, need_dq: bool, need_dkv: bool, need_dbias: bool, need_dsink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias and dsink, contiguous in the inputs' shapes and dtypes; empty where not needed."""
    packed = Packed(cu_seqlens_q, cu_seqlens_k, seqused_k, None, max_seqlen_q, max_seqlen_k)
    problem = _problem(
        packed, q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, softmax_scale, window_left,
        window_right, bottom_right, softcap, dropout_p,
    )  # fmt: skip
    do, out, lse = do.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    dlse = None if dlse is None else dlse.unsqueeze(0)
    dq, dk, dv, dbias, dsink = bwd.run(problem, do, dlse, out, lse, need_dq, need_dkv, need_dbias, need_dsink)
    if need_dq:
        dq = dq.view(q.shape)
    if need_dkv:
        dk, dv = dk.view(k.shape), dv.view(v.shape)
    return dq, dk, dv, dbias, dsink


def _problem(packed: Packed, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Problem:
    """`options`: those of Problem, in its order."""
    attn_bias, alibi_slopes, attn_sink, key_mask, *rest = options
    if q.is_cpu:  # the interpreter: contents can be looked at
        check_varlen_contents(
            q, k, packed.cu_seqlens_q, packed.cu_seqlens_k, packed.seqused_k, packed.page_table,
            packed.max_seqlen_q, packed.max_seqlen_k,
        )  # fmt: skip
    if packed.page_table is None:
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    key_mask = None if key_mask is None else key_mask.unsqueeze(0)
    arguments = q.unsqueeze(0), k, v, attn_bias, alibi_slopes, attn_sink, key_mask, *rest, packed
    return Problem(*arguments)
