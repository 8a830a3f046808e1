"""attention_varlen's operations in torch.library; see registration.py."""

from typing import Any

import torch
from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.replay import PlainCalls
from onepass.ops.attention import kernels, spec_varlen
from onepass.ops.attention.registration import Tensors, new_gradient
from onepass.ops.attention.spec import lse_dtype

# After v and cu_seqlens_q, cu_seqlens_k, seqused_k: page_table, which the backward does not have.
_OPTIONS = (
    "Tensor? attn_bias, Tensor? alibi_slopes, Tensor? attn_sink, Tensor? key_mask, Tensor? rng_state, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, SymInt window_left, SymInt window_right, "
    "bool bottom_right, float softcap, float dropout_p, bool deterministic"
)
_NO_VMAP = "pack the mapped dimension's sequences too, torch.cat over tokens"


def _forward_facts(*call: Any) -> tuple[Any, ...]:
    return spec_varlen.varlen_facts(*call[:14], *call[15:])  # all but softmax_scale


def _backward_facts(*call: Any) -> tuple[Any, ...]:
    do, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, *options = call
    arguments = q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, None, *options[:7], *options[8:]
    facts = spec_varlen.varlen_facts(*arguments)
    spec_varlen.check_varlen_backward(do, dlse, q, v, out, lse)
    return facts


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensors:
    total_q, nheads_q, _ = q.shape
    return (
        q.new_empty((total_q, nheads_q, v.shape[-1])),
        q.new_empty((nheads_q, total_q), dtype=lse_dtype(q.dtype)),
    )


def _backward_fake(*call: Any) -> Tensors:
    q, k, v = call[2:5]
    attn_bias, _, attn_sink = call[10:13]
    need_dq, need_dkv, need_dbias, need_dsink = call[-4:]
    return (
        new_gradient(q, q, need_dq),
        new_gradient(q, k, need_dkv),
        new_gradient(q, v, need_dkv),
        new_gradient(q, attn_bias, need_dbias),
        new_gradient(q, attn_sink, need_dsink),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    ctx.paged = inputs[6] is not None
    if not ctx.paged:
        ctx.save_for_backward(*inputs[:6], *inputs[7:12], *outputs)
        ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.paged:
        raise NotImplementedError(
            "onepass.attention_varlen with page_table is forward only: train on packed k and v, without pages"
        )
    if do is None and dlse is None:
        return (None,) * 22
    q, k, v, *optional, out, lse = ctx.saved_tensors
    *options, backend = ctx.options
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    need_bias, need_sink = ctx.needs_input_grad[7], ctx.needs_input_grad[9]
    if do is None:
        do = torch.zeros_like(out)
    needs = (need_q, need_k or need_v, need_bias, need_sink)
    dq, dk, dv, dbias, dsink = backward(do, dlse, q, k, v, out, lse, *optional, *options, *needs, backend)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        *(None,) * 4,
        dbias if need_bias else None,
        None,
        dsink if need_sink else None,
        *(None,) * 12,
    )


backward = Operation(
    "attention_varlen_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, {_OPTIONS}, bool need_dq, bool need_dkv, "
    "bool need_dbias, bool need_dsink, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    table=kernels.VARLEN_BACKWARD,
    facts=_backward_facts,
    fake=_backward_fake,
    public="attention_varlen",
    vmap_advice=_NO_VMAP,
)
forward = Operation(
    "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"Tensor? seqused_k, Tensor? page_table, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)",
    table=kernels.VARLEN_FORWARD,
    facts=_forward_facts,
    fake=_forward_fake,
    public="attention_varlen",
    save=_save,
    differentiate=_differentiate,
    vmap_advice=_NO_VMAP,
)

# What api_varlen.py calls: out and lse.
attended = PlainCalls(kernels.VARLEN_FORWARD, forward.body, forward)
