"""attention's operations in torch.library: schemas, fakes, autograd, and the way from a call to a kernel.

The options are canonical here: causal is window_right = 0, -1 is an unlimited window, attn_bias is 4-D, backend ""
leaves the choice to the tables of kernels.py.
"""

from typing import Any

import torch
from torch import Tensor

from onepass.core import torch_compat
from onepass.core.operation import register
from onepass.core.registry import direct, select
from onepass.ops.attention import kernels, spec

Tensors = tuple[Tensor, ...]

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, {more}Tensor? attn_bias, Tensor? alibi_slopes, Tensor? attn_sink, Tensor? key_mask, "
    "Tensor? rng_state, float softmax_scale, SymInt window_left, SymInt window_right, bool bottom_right, "
    "float softcap, float dropout_p, bool deterministic"
)

# The bodies: check, choose, launch. The arguments are spelled out: *args would cost a microsecond.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    key_mask: Tensor | None,
    rng_state: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    backend: str,
) -> Tensors:
    facts = spec.attention_facts(
        q,
        k,
        v,
        attn_bias,
        alibi_slopes,
        attn_sink,
        key_mask,
        rng_state,
        window_left,
        window_right,
        bottom_right,
        softcap,
        dropout_p,
        deterministic,
    )
    result: Tensors = select(kernels.FORWARD, facts, backend)(
        q,
        k,
        v,
        attn_bias,
        alibi_slopes,
        attn_sink,
        key_mask,
        rng_state,
        softmax_scale,
        window_left,
        window_right,
        bottom_right,
        softcap,
        dropout_p,
        deterministic,
    )
    return result


def _backward(*args: Any) -> Tensors:
    *call, backend = args
    result: Tensors = select(kernels.BACKWARD, _backward_facts(call), backend)(*call)
    return result


def _backward_facts(call: list[Any]) -> tuple[Any, ...]:
    do, dlse, q, k, v, out, lse, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, _, *rest = call
    facts = spec.attention_facts(q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, *rest)
    spec.check_backward(do, dlse, q, v, out, lse)
    return facts


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    facts = spec.decode_facts(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        page_table,
        alibi_slopes,
        attn_sink,
        k_descale,
        v_descale,
        window_left,
        window_right,
        softcap,
    )
    result: tuple[Tensor, Tensor | None] = select(kernels.DECODE, facts, backend)(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        page_table,
        alibi_slopes,
        attn_sink,
        k_descale,
        v_descale,
        softmax_scale,
        window_left,
        window_right,
        softcap,
        num_splits,
        need_lse,
    )
    return result


def _decode_op_body(*args: Any) -> Tensors:
    """The operation has a fixed number of outputs: an lse that nobody needs is empty."""
    out, lse = _decode(*args)
    return out, out.new_empty(0, dtype=spec.lse_dtype(out.dtype)) if lse is None else lse


def _merge(outs: Tensor, lses: Tensor, backend: str) -> Tensors:
    result: Tensors = select(kernels.MERGE, spec.merge_facts(outs, lses), backend)(outs, lses)
    return result


def _merge_backward(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, backend: str
) -> Tensors:
    facts = spec.merge_facts(outs, lses)
    spec.check_merge_backward(do, dlse, outs, lses, out, lse)
    result: Tensors = select(kernels.MERGE_BACKWARD, facts, backend)(do, dlse, outs, lses, out, lse)
    return result


# The fakes: the same checks, and outputs of the right shape.


def _forward_fake(*args: Any) -> Tensors:
    facts = args[:8] + args[9:-1]  # all but softmax_scale and backend
    spec.attention_facts(*facts)
    return _new_outputs(args[0], args[2])


def _new_outputs(q: Tensor, v: Tensor) -> Tensors:
    batch, seqlen_q, nheads_q, _ = q.shape
    return (
        q.new_empty((batch, seqlen_q, nheads_q, v.shape[3])),
        q.new_empty((batch, nheads_q, seqlen_q), dtype=spec.lse_dtype(q.dtype)),
    )


def _backward_fake(*args: Any) -> Tensors:
    *call, _ = args
    _backward_facts(call)
    _, _, q, k, v, _, _, attn_bias, _, attn_sink = call[:10]
    need_dq, need_dkv, need_dbias, need_dsink = call[-4:]
    return (
        _new_gradient(q, q, need_dq),
        _new_gradient(q, k, need_dkv),
        _new_gradient(q, v, need_dkv),
        _new_gradient(q, attn_bias, need_dbias),
        _new_gradient(q, attn_sink, need_dsink),
    )


def _new_gradient(q: Tensor, of: Tensor | None, needed: bool) -> Tensor:
    return of.new_empty(of.shape) if needed and of is not None else q.new_empty((0,))


def _decode_fake(*args: Any) -> Tensors:
    facts = args[:9] + args[10:-3]  # all but softmax_scale, num_splits, need_lse and backend
    spec.decode_facts(*facts)
    out, lse = _new_outputs(args[0], args[2])
    return out, lse if args[-2] else lse.new_empty(0)


def _merge_fake(outs: Tensor, lses: Tensor, backend: str) -> Tensors:
    spec.merge_facts(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _merge_backward_fake(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, backend: str
) -> Tensors:
    spec.merge_facts(outs, lses)
    spec.check_merge_backward(do, dlse, outs, lses, out, lse)
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
    call = (do, dlse, q, k, v, out, lse, *optional, *options, *needs, backend)
    plain = torch_compat.below_dispatcher(do, dlse, q, k, v, out, lse, *optional) and not (
        torch_compat.batched_gradient(do) or (dlse is not None and torch_compat.batched_gradient(dlse))
    )
    dq, dk, dv, dbias, dsink = _backward(*call) if plain else _backward_op(*call)
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
    douts, dlses = _merge_backward_op(do, dlse, outs, lses, out, lse, ctx.backend)
    return douts, dlses, None


# The operations.

_NO_VMAP = "make the mapped dimension part of batch, x.movedim(dim, 0).flatten(0, 1)"

_forward_op = register(
    f"attention_fwd({_OPTIONS.format(more='')}, str backend) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    public="attention",
    save=_save,
    differentiate=_differentiate,
    vmap_advice=_NO_VMAP,
)
_backward_op = register(
    f"attention_bwd(Tensor do, Tensor? dlse, {_OPTIONS.format(more='Tensor out, Tensor lse, ')}, bool need_dq, "
    "bool need_dkv, bool need_dbias, bool need_dsink, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    _backward,
    _backward_fake,
    public="attention",
    vmap_advice=_NO_VMAP,
)
_decode_op = register(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, Tensor? page_table, "
    "Tensor? alibi_slopes, Tensor? attn_sink, Tensor? k_descale, Tensor? v_descale, float softmax_scale, "
    "SymInt window_left, SymInt window_right, float softcap, SymInt num_splits, bool need_lse, str backend) "
    "-> (Tensor out, Tensor lse)",
    _decode_op_body,
    _decode_fake,
    public="attention_decode",
    refusal="onepass.attention_decode is forward only: train with onepass.attention",
    vmap_advice=_NO_VMAP,
)
_merge_op = register(
    "merge_attention(Tensor outs, Tensor lses, str backend) -> (Tensor out, Tensor lse)",
    _merge,
    _merge_fake,
    public="merge_attention",
    save=_save_merge,
    differentiate=_differentiate_merge,
    vmap_advice=_NO_VMAP,
)
_merge_backward_op = register(
    "merge_attention_bwd(Tensor do, Tensor? dlse, Tensor outs, Tensor lses, Tensor out, Tensor lse, str backend) "
    "-> (Tensor douts, Tensor dlses)",
    _merge_backward,
    _merge_backward_fake,
    public="merge_attention",
    vmap_advice=_NO_VMAP,
)


# What api.py calls: through the dispatcher, or straight to the body when the dispatcher has nothing to add.


def attention_fwd(call: tuple[Any, ...], need_lse: bool) -> tuple[Tensor, Tensor | None]:
    if torch_compat.below_dispatcher(*call[:8]):
        if not need_lse and (out := direct(kernels.FORWARD, call[-1], call[0].is_cpu)(call)) is not None:
            return out, None
        out, lse = _forward(*call)
        return out, lse
    out, lse = _forward_op(*call)
    return out, lse


def attention_decode(call: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    if torch_compat.below_dispatcher(*call[:9]):
        if (out := direct(kernels.DECODE, call[-1], call[0].is_cpu)(call)) is not None:
            return out, None
        return _decode(*call)
    out, lse = _decode_op(*call)
    return out, lse


def merge_attention(outs: Tensor, lses: Tensor, backend: str) -> Tensors:
    result: Tensors = _merge_op(outs, lses, backend)
    return result
