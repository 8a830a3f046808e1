"""attention's operations in torch.library: schemas, fakes, autograd, and the way from a call to a kernel.

The options are canonical here: causal is window_right = 0, -1 is an unlimited window, attn_bias is 4-D, backend "" leaves
the choice to the tables of kernels.py.
"""

from typing import Any

import torch
from torch import Tensor

from onepass.core import torch_compat
from onepass.core.registry import select
from onepass.ops.attention import kernels, spec

Tensors = tuple[Tensor, ...]

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, {more}Tensor? attn_bias, Tensor? alibi_slopes, Tensor? attn_sink, Tensor? key_mask, "
    "Tensor? rng_state, float softmax_scale, SymInt window_left, SymInt window_right, bool bottom_right, float softcap, "
    "float dropout_p, bool deterministic"
)

_LIBRARY = torch.library.Library("onepass", "FRAGMENT")
_LIBRARY.define(f"attention_fwd({_OPTIONS.format(more='')}, str backend) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"attention_bwd(Tensor do, Tensor? dlse, {_OPTIONS.format(more='Tensor out, Tensor lse, ')}, bool need_dq, bool need_dkv, "
    "bool need_dbias, bool need_dsink, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)"
)
_LIBRARY.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, Tensor? page_table, "
    "Tensor? alibi_slopes, Tensor? attn_sink, Tensor? k_descale, Tensor? v_descale, float softmax_scale, SymInt window_left, "
    "SymInt window_right, float softcap, SymInt num_splits, str backend) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define("merge_attention(Tensor outs, Tensor lses, str backend) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    "merge_attention_bwd(Tensor do, Tensor? dlse, Tensor outs, Tensor lses, Tensor out, Tensor lse, str backend) "
    "-> (Tensor douts, Tensor dlses)"
)


# The bodies: check, choose, launch.


def _forward(*args: Any) -> Tensors:
    *call, backend = args
    facts, _ = spec.attention_spec(*call)
    result: Tensors = select(kernels.FORWARD, facts, backend)(*call)
    return result


def _backward(*args: Any) -> Tensors:
    *call, backend = args
    facts, _ = _backward_spec(call)
    result: Tensors = select(kernels.BACKWARD, facts, backend)(*call)
    return result


def _backward_spec(call: list[Any]) -> tuple[spec.AttentionSpec, spec.Problem]:
    do, dlse, q, k, v, out, lse, *options = call
    options, needs = options[:-4], tuple(options[-4:])
    facts, problem = spec.attention_spec(q, k, v, *options, needs=needs)
    spec.check_backward(problem, q, do, dlse, out, lse)
    return facts, problem


def _decode(*args: Any) -> Tensors:
    *call, backend = args
    facts, problem = spec.decode_spec(*call)
    spec.check_cache_contents(problem.seqlen_k, call[1], call[3], call[4])
    result: Tensors = select(kernels.DECODE, facts, backend)(*call)
    return result


def _merge(outs: Tensor, lses: Tensor, backend: str) -> Tensors:
    result: Tensors = select(kernels.MERGE, spec.merge_spec(outs, lses), backend)(outs, lses)
    return result


def _merge_backward(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, backend: str
) -> Tensors:
    facts = spec.merge_spec(outs, lses)
    spec.check_merge_backward(do, dlse, outs, lses, out, lse)
    result: Tensors = select(kernels.MERGE_BACKWARD, facts, backend)(do, dlse, outs, lses, out, lse)
    return result


# The fakes: the same checks, and outputs of the right shape.


def _forward_fake(*args: Any) -> Tensors:
    *call, _ = args
    _, problem = spec.attention_spec(*call)
    return _new_outputs(call[0], problem)


def _new_outputs(q: Tensor, problem: spec.Problem) -> Tensors:
    batch, seqlen_q, _, nheads_q, _, _, head_dim_v = problem
    return (
        q.new_empty((batch, seqlen_q, nheads_q, head_dim_v)),
        q.new_empty((batch, nheads_q, seqlen_q), dtype=spec.lse_dtype(q.dtype)),
    )


def _backward_fake(*args: Any) -> Tensors:
    *call, _ = args
    _backward_spec(call)
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
    *call, _ = args
    _, problem = spec.decode_spec(*call)
    return _new_outputs(call[0], problem)


def _merge_fake(outs: Tensor, lses: Tensor, backend: str) -> Tensors:
    spec.merge_spec(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _merge_backward_fake(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, backend: str
) -> Tensors:
    spec.merge_spec(outs, lses)
    spec.check_merge_backward(do, dlse, outs, lses, out, lse)
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


# Autograd.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *call, backend = inputs
    tensors, options = call[:8], call[8:]
    torch_compat.refuse_forward_ad("attention", inputs)
    ctx.save_for_backward(*tensors, *output)
    ctx.options = options
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    q, k, v, *optional = tensors
    need_q, need_k, need_v, need_bias, _, need_sink = ctx.needs_input_grad[:6]
    if do is None and dlse is None:
        return (None,) * len(ctx.needs_input_grad)
    if do is None:
        do = torch.zeros_like(out)
    dq, dk, dv, dbias, dsink = torch.ops.onepass.attention_bwd.default(
        do,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        *optional,
        *ctx.options,
        need_q,
        need_k or need_v,
        need_bias,
        need_sink,
        ctx.backend,
    )
    gradients = [
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        dbias if need_bias else None,
        None,
        dsink if need_sink else None,
    ]
    return (*gradients, *([None] * (len(ctx.needs_input_grad) - len(gradients))))


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    outs, lses, backend = inputs
    torch_compat.refuse_forward_ad("merge_attention", inputs)
    ctx.save_for_backward(outs, lses, *output)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _differentiate_merge(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    outs, lses, out, lse = ctx.saved_tensors
    if do is None and dlse is None:
        return None, None, None
    if do is None:
        do = torch.zeros_like(out)
    douts, dlses = torch.ops.onepass.merge_attention_bwd.default(do, dlse, outs, lses, out, lse, ctx.backend)
    return douts, dlses, None


def _refuses_gradient(message: str) -> Any:
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(message)

    return backward


def _refuses_vmap(op: str) -> Any:
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError(
            f"torch.vmap over onepass.{op} is not supported: move the mapped dimension into batch, "
            "x.movedim(dim, 0).flatten(0, 1)"
        )

    return vmap


def _register() -> None:
    bodies = {
        "attention_fwd": (_forward, _forward_fake, "attention"),
        "attention_bwd": (_backward, _backward_fake, "attention's backward"),
        "attention_decode": (_decode, _decode_fake, "attention_decode"),
        "merge_attention": (_merge, _merge_fake, "merge_attention"),
        "merge_attention_bwd": (_merge_backward, _merge_backward_fake, "merge_attention's backward"),
    }
    for name, (body, fake, public) in bodies.items():
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"onepass::{name}", fake, lib=_LIBRARY)
        torch.library.register_vmap(f"onepass::{name}", _refuses_vmap(public), lib=_LIBRARY)
    gradients = {
        "attention_fwd": (_differentiate, _save),
        "attention_bwd": (_refuses_gradient("onepass.attention has no second derivative (create_graph=True)"), None),
        "attention_decode": (
            _refuses_gradient("onepass.attention_decode is forward only: use onepass.attention for training"),
            None,
        ),
        "merge_attention": (_differentiate_merge, _save_merge),
        "merge_attention_bwd": (_refuses_gradient("onepass.merge_attention has no second derivative"), None),
    }
    for name, (backward, setup) in gradients.items():
        torch.library.register_autograd(f"onepass::{name}", backward, setup_context=setup, lib=_LIBRARY)


_register()

_forward_op = torch.ops.onepass.attention_fwd.default
_decode_op = torch.ops.onepass.attention_decode.default
_merge_op = torch.ops.onepass.merge_attention.default


def attention_fwd(*args: Any) -> Tensors:
    """attention_fwd through the dispatcher, or straight to its body when the dispatcher has nothing to add."""
    if torch_compat.below_dispatcher(*args[:8]):
        return _forward(*args)
    result: Tensors = _forward_op(*args)
    return result


def attention_decode(*args: Any) -> Tensors:
    """attention_decode, the same way."""
    if torch_compat.below_dispatcher(*args[:9]):
        return _decode(*args)
    result: Tensors = _decode_op(*args)
    return result


def merge_attention(outs: Tensor, lses: Tensor, backend: str) -> Tensors:
    """merge_attention through the dispatcher."""
    result: Tensors = _merge_op(outs, lses, backend)
    return result
