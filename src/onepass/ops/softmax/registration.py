"""Softmax's operations in torch.library."""

from typing import Any

from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.replay import PlainCalls
from onepass.ops.softmax import kernels, spec


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    ctx.save_for_backward(y)
    ctx.backend = inputs[-1]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return backward(dy, y, ctx.backend), None


backward = Operation(
    "softmax_bwd(Tensor dy, Tensor y, str backend) -> Tensor",
    table=kernels.BACKWARD,
    facts=spec.backward_facts,
    fake=_backward_fake,
    public="softmax",
)
forward = Operation(
    "softmax_fwd(Tensor x, str backend) -> Tensor",
    table=kernels.FORWARD,
    facts=spec.softmax_facts,
    fake=_forward_fake,
    public="softmax",
    save=_save,
    differentiate=_differentiate,
)

# What api.py calls.
softmax = PlainCalls(kernels.FORWARD, forward.body, forward)
