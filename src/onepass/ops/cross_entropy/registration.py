"""Cross-entropy's operations in torch.library, over rows of logits; the reduction is part of the operation.

The forward keeps lse and, for the mean, 1 / counted rows; the backward makes dlogits of logits and lse in one pass.
"""

from typing import Any

from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.registry import select
from onepass.core.replay import PlainCalls
from onepass.ops.cross_entropy import kernels, spec

Tensors = tuple[Tensor, ...]


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensors:
    lse = logits.new_empty(logits.shape[:1], dtype=spec.loss_dtype(logits.dtype))
    return (
        lse.new_empty(lse.shape if reduction == "none" else ()),
        lse,
        lse.new_empty(() if reduction == "mean" else (0,)),
    )


def _backward_fake(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


class _Forward(Operation):
    """Two kernels: the rows, then their reduction."""

    def body(self, *args: Any) -> Tensors:
        *options, reduction, backend = args
        facts = self.facts(*args[:-1])
        logits, target, ignore_index = args[:3]
        launcher = select(kernels.FORWARD, facts, backend)
        spec.require_targets_before(launcher, target, logits.shape[1], ignore_index)
        rows, lse = launcher(*options)
        if reduction == "none":
            return rows, lse, rows.new_empty(0)
        loss, scale = select(kernels.REDUCE, facts, backend)(rows, target, ignore_index, reduction == "mean")
        return loss, lse, scale


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    logits, target, *options, reduction, backend = inputs
    _, lse, scale = outputs
    ctx.save_for_backward(logits, target, lse, scale)
    ctx.mark_non_differentiable(scale)
    ctx.options, ctx.reduction, ctx.backend = options, reduction, backend
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, dscale: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if dloss is None and dlse is None:
        return None, *nothing
    logits, target, lse, scale = ctx.saved_tensors
    return backward(
        rows_gradient(dloss, lse, scale, ctx.reduction),
        dlse,
        logits,
        target,
        lse,
        *ctx.options,
        ctx.backend,
    ), *nothing


def rows_gradient(dloss: Tensor | None, lse: Tensor, scale: Tensor, reduction: str) -> Tensor:
    """The gradient of each row's loss (rows,): expanded where all rows share one."""
    if dloss is None:
        return lse.new_zeros(()).expand(lse.shape)
    if reduction == "mean":
        dloss = dloss * scale
    return dloss if reduction == "none" else dloss.expand(lse.shape)


backward = Operation(
    "cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor logits, Tensor target, Tensor lse, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, str backend) -> Tensor",
    table=kernels.BACKWARD,
    facts=spec.backward_facts,
    fake=_backward_fake,
    public="cross_entropy",
)
forward = _Forward(
    "cross_entropy_fwd(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float z_loss, "
    "float softcap, str reduction, str backend) -> (Tensor loss, Tensor lse, Tensor scale)",
    table=kernels.FORWARD,
    facts=spec.forward_facts,
    fake=_forward_fake,
    public="cross_entropy",
    save=_save,
    differentiate=_differentiate,
)


# What api.py calls: loss and lse.


def _launch(*call: Any) -> tuple[Tensor, Tensor]:
    loss, lse, _ = forward.body(*call)
    return loss, lse


def _dispatched(*call: Any) -> tuple[Tensor, Tensor]:
    loss, lse, _ = forward(*call)
    return loss, lse


cross_entropy = PlainCalls(kernels.FORWARD, _launch, _dispatched)
