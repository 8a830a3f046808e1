"""attention's operations in torch.library: schemas, fakes, autograd, and the way from a call to a kernel.

The options are canonical here: causal is window_right = 0, -1 is an unlimited window, attn_bias is 4-D, backend ""
leaves the choice to the tables of kernels.py.
"""

from typing import Any

import torch
from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.replay import PlainCalls
from onepass.ops.attention import kernels, spec

Tensors = tuple[Tensor, ...]

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, {more}Tensor? attn_bias, Tensor? alibi_slopes, Tensor? attn_sink, Tensor? key_mask, "
    "Tensor? rng_state, float softmax_scale, SymInt window_left, SymInt window_right, bool bottom_right, "
    "float softcap, float dropout_p, bool deterministic"
)

# What the kernels judge: the arguments but for the backend.


def _forward_facts(*call: Any) -> tuple[Any, ...]:
    return spec.attention_facts(*call[:8], *call[9:])  # all but softmax_scale


def _backward_facts(*call: Any) -> tuple[Any, ...]:
    do, dlse, q, k, v, out, lse, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, _, *rest = call
    facts = spec.attention_facts(q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, *rest)
    spec.check_backward(do, dlse, q, v, out, lse)
    return facts


def _decode_facts(*call: Any) -> tuple[Any, ...]:
    return spec.decode_facts(*call[:11], *call[12:-2])  # all but softmax_scale, num_splits and need_lse


def _merge_backward_facts(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> tuple[Any, ...]:
    facts = spec.merge_facts(outs, lses)
    spec.check_merge_backward(do, dlse, outs, lses, out, lse)
    return facts


# The fakes: outputs of the right shape.


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensors:
    batch, seqlen_q, nheads_q, _ = q.shape
    return (
        q.new_empty((batch, seqlen_q, nheads_q, v.shape[3])),
        q.new_empty((batch, nheads_q, seqlen_q), dtype=spec.lse_dtype(q.dtype)),
    )


def _backward_fake(*call: Any) -> Tensors:
    _, _, q, k, v, _, _, attn_bias, _, attn_sink = call[:10]
    need_dq, need_dkv, need_dbias, need_dsink = call[-4:]
    return (
        new_gradient(q, q, need_dq),
        new_gradient(q, k, need_dkv),
        new_gradient(q, v, need_dkv),
        new_gradient(q, attn_bias, need_dbias),
        new_gradient(q, attn_sink, need_dsink),
    )


def new_gradient(q: Tensor, of: Tensor | None, needed: bool) -> Tensor:
    return of.new_empty(of.shape) if needed and of is not None else q.new_empty((0,))


def _decode_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any) -> Tensors:
    out, lse = _forward_fake(q, k_cache, v_cache)
    if options[7] is not None:  # int4: two features a byte
        out = q.new_empty((*q.shape[:3], 2 * v_cache.shape[3]))
    need_lse = options[-1]
    return out, lse if need_lse else lse.new_empty(0)


def _merge_fake(outs: Tensor, lses: Tensor) -> Tensors:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _merge_backward_fake(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> Tensors:
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


# Autograd.


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    ctx.save_for_backward(*inputs[:8], *outputs)
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None and dlse is None:
        return (None,) * 16
    q, k, v, *optional, out, lse = ctx.saved_tensors
    *options, backend = ctx.options
    need_q, need_k, need_v, need_bias, _, need_sink = ctx.needs_input_grad[:6]
    if do is None:
        do = torch.zeros_like(out)
    needs = (need_q, need_k or need_v, need_bias, need_sink)
    dq, dk, dv, dbias, dsink = backward(do, dlse, q, k, v, out, lse, *optional, *options, *needs, backend)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        dbias if need_bias else None,
        None,
        dsink if need_sink else None,
        *(None,) * 10,
    )


def _save_merge(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    outs, lses, backend = inputs
    ctx.save_for_backward(outs, lses, *outputs)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _differentiate_merge(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    outs, lses, out, lse = ctx.saved_tensors
    if do is None and dlse is None:
        return None, None, None
    if do is None:
        do = torch.zeros_like(out)
    douts, dlses = merge_backward(do, dlse, outs, lses, out, lse, ctx.backend)
    return douts, dlses, None


# The operations.

_NO_VMAP = "make the mapped dimension part of batch, x.movedim(dim, 0).flatten(0, 1)"
_NO_VMAP_OF_PARTS = "make the mapped dimension part of batch, the second one: x.movedim(dim, 1).flatten(1, 2)"

backward = Operation(
    f"attention_bwd(Tensor do, Tensor? dlse, {_OPTIONS.format(more='Tensor out, Tensor lse, ')}, bool need_dq, "
    "bool need_dkv, bool need_dbias, bool need_dsink, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    table=kernels.BACKWARD,
    facts=_backward_facts,
    fake=_backward_fake,
    public="attention",
    vmap_advice=_NO_VMAP,
)
forward = Operation(
    f"attention_fwd({_OPTIONS.format(more='')}, str backend) -> (Tensor out, Tensor lse)",
    table=kernels.FORWARD,
    facts=_forward_facts,
    fake=_forward_fake,
    public="attention",
    save=_save,
    differentiate=_differentiate,
    vmap_advice=_NO_VMAP,
)
decode = Operation(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, Tensor? page_table, "
    "Tensor? alibi_slopes, Tensor? attn_sink, Tensor? k_descale, Tensor? v_descale, Tensor? k_scale_shift, "
    "Tensor? v_scale_shift, float softmax_scale, SymInt window_left, "
    "SymInt window_right, float softcap, SymInt num_splits, bool need_lse, str backend) "
    "-> (Tensor out, Tensor lse)",
    table=kernels.DECODE,
    facts=_decode_facts,
    fake=_decode_fake,
    public="attention_decode",
    refusal="onepass.attention_decode is forward only: train with onepass.attention",
    vmap_advice=_NO_VMAP,
)
merge_backward = Operation(
    "merge_attention_bwd(Tensor do, Tensor? dlse, Tensor outs, Tensor lses, Tensor out, Tensor lse, str backend) "
    "-> (Tensor douts, Tensor dlses)",
    table=kernels.MERGE_BACKWARD,
    facts=_merge_backward_facts,
    fake=_merge_backward_fake,
    public="merge_attention",
    vmap_advice=_NO_VMAP_OF_PARTS,
)
merge = Operation(
    "merge_attention(Tensor outs, Tensor lses, str backend) -> (Tensor out, Tensor lse)",
    table=kernels.MERGE,
    facts=spec.merge_facts,
    fake=_merge_fake,
    public="merge_attention",
    save=_save_merge,
    differentiate=_differentiate_merge,
    vmap_advice=_NO_VMAP_OF_PARTS,
)


# What api.py calls: out and lse.

attended = PlainCalls(kernels.FORWARD, forward.body, forward)
decoded = PlainCalls(kernels.DECODE, decode.body, decode)
merged = PlainCalls(kernels.MERGE, merge.body, merge)
