"""linear_cross_entropy's operations in torch.library, over rows. Their bodies are in linear.py.

The forward returns the gradients of a mean or a sum beside it, for its own backward to scale; `now` asks for them.
"""

from typing import Any

import torch
from torch import Tensor

from onepass.core import torch_compat
from onepass.core.operation import Operation
from onepass.core.registry import select
from onepass.ops.cross_entropy import kernels, linear, spec
from onepass.ops.cross_entropy.registration import rows_gradient

Tensors = tuple[Tensor, ...]


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    now: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> Tensors:
    lse = x.new_empty(x.shape[:1], dtype=spec.loss_dtype(x.dtype))
    return (
        lse.new_empty(lse.shape if reduction == "none" else ()),
        lse,
        lse.new_empty(() if reduction == "mean" else (0,)),
        *_gradients_fake(x, weight, bias, now and need_dx, now and need_dweight, now and need_dbias),
    )


def _gradients_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> Tensors:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        weight.new_empty(weight.shape) if need_dweight else x.new_empty((0,)),
        bias.new_empty(bias.shape) if need_dbias and bias is not None else x.new_empty((0,)),
    )


def _backward_fake(
    dloss: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> Tensors:
    return _gradients_fake(x, weight, bias, need_dx, need_dweight, need_dbias)


def _losses(facts: tuple[Any, ...], backend: str, ignore_index: int, *options: float) -> linear.Losses:
    return linear.Losses(
        select(kernels.FORWARD, facts, backend),
        select(kernels.BACKWARD, facts, backend),
        select(kernels.REDUCE, facts, backend),
        select(kernels.CARRY, facts, backend),
        ignore_index,
        options,
    )


class _Forward(Operation):
    def body(self, *args: Any) -> Tensors:
        x, weight, bias, target, ignore_index, *options, reduction, now, need_dx, need_dweight, need_dbias, name = args
        losses = _losses(self.facts(*args[:-1]), name, ignore_index, *options)
        classes = weight.shape[0]
        spec.require_targets_before(losses.forward, target, classes, ignore_index)
        needs = (need_dx, need_dweight, need_dbias and bias is not None)
        try:
            return linear.forward(x, weight, bias, target, losses, reduction, now, needs)
        except IndexError:  # found in a strip of rows; the message counts from the first of all
            raise spec.wrong_target_error(target, classes, ignore_index) from None


class _Backward(Operation):
    def body(self, *args: Any) -> Tensors:
        dloss, dlse, x, weight, bias, target, lse, ignore_index, *options, need_dx, need_dw, need_db, name = args
        losses = _losses(self.facts(*args[:-1]), name, ignore_index, *options)
        spec.require_targets_before(losses.backward, target, weight.shape[0], ignore_index)
        needs = (need_dx, need_dw, need_db and bias is not None)
        return linear.backward(dloss, dlse, x, weight, bias, target, lse, losses, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    x, weight, bias, target, *options, reduction, now, _, _, _, backend = inputs
    _, lse, scale, *gradients = outputs
    # lse has a gradient where the backward makes the logits again; api.py asks for no lse with `now`.
    ctx.mark_non_differentiable(scale, *gradients, *((lse,) if now else ()))
    if now:
        ctx.save_for_backward(*gradients)
        ctx.facts = spec.linear_facts(*inputs[:-1])
        # The outputs of a raw op are its caller's, and hooks on saved tensors see what is saved.
        ctx.ours = getattr(ctx, "outputs_are_ours", False) and not torch_compat.saved_tensors_hooked()
    else:
        ctx.save_for_backward(x, weight, bias, target, lse, scale)
    ctx.options, ctx.reduction, ctx.now, ctx.backend = options, reduction, now, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    nothing = (None,) * 11
    if dloss is None and dlse is None:
        return (None, None, None, *nothing)
    if ctx.now:
        assert dloss is not None  # lse has no gradient then
        if torch.is_grad_enabled():
            raise NotImplementedError("onepass.linear_cross_entropy has no second derivative (create_graph=True)")
        gradients = _scaled(ctx, dloss)
    else:
        *tensors, lse, scale = ctx.saved_tensors
        rows = rows_gradient(dloss, lse, scale, ctx.reduction)
        gradients = backward(rows, dlse, *tensors, lse, *ctx.options, *needs, ctx.backend)
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *nothing)


def _scaled(ctx: Any, dloss: Tensor) -> tuple[Tensor, ...]:
    """The gradients that the forward has made for a dloss of 1, times dloss: in place when nobody else can see them."""
    saved = ctx.saved_tensors
    ours = ctx.ours and not torch_compat.graph_is_kept() and not torch_compat.batched_gradient(dloss)
    if not ours or not torch_compat.below_dispatcher(*saved, dloss):
        return tuple(gradient * dloss for gradient in saved)
    scale = select(kernels.SCALE, ctx.facts, ctx.backend)
    for gradient in saved:
        scale(gradient, dloss)
    return tuple(saved)


backward = _Backward(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor x, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor lse, int ignore_index, float label_smoothing, float z_loss, float softcap, bool need_dx, "
    "bool need_dweight, bool need_dbias, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    table=kernels.BACKWARD,
    facts=spec.linear_backward_facts,
    fake=_backward_fake,
    public="linear_cross_entropy",
)
forward = _Forward(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, str reduction, bool now, bool need_dx, bool need_dweight, "
    "bool need_dbias, str backend) "
    "-> (Tensor loss, Tensor lse, Tensor scale, Tensor dx, Tensor dweight, Tensor dbias)",
    table=kernels.FORWARD,
    facts=spec.linear_facts,
    fake=_forward_fake,
    public="linear_cross_entropy",
    save=_save,
    differentiate=_differentiate,
)


# What api.py calls.


def linear_cross_entropy(call: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """loss and lse, for the arguments of linear_cross_entropy_fwd."""
    loss, lse, *_ = forward(*call)
    return loss, lse
