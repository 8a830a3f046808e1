"""The operations of swiglu and geglu in torch.library; they are one, told apart by `activation`."""

from typing import Any

from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.replay import PlainCalls
from onepass.ops.swiglu import kernels, spec


def _forward_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape if need_dgate else (0,)), up.new_empty(up.shape if need_dup else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], out: Tensor) -> None:
    gate, up, activation, backend = inputs
    ctx.save_for_backward(gate, up)
    ctx.options = activation, backend


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    activation, backend = ctx.options
    need_gate, need_up = ctx.needs_input_grad[:2]
    dgate, dup = backward(dout, gate, up, activation, need_gate, need_up, backend)
    return dgate if need_gate else None, dup if need_up else None, None, None


backward = Operation(
    "swiglu_bwd(Tensor dout, Tensor gate, Tensor up, str activation, bool need_dgate, bool need_dup, str backend) "
    "-> (Tensor dgate, Tensor dup)",
    table=kernels.BACKWARD,
    facts=spec.backward_facts,
    fake=_backward_fake,
    public="swiglu and geglu",
)
forward = Operation(
    "swiglu_fwd(Tensor gate, Tensor up, str activation, str backend) -> Tensor out",
    table=kernels.FORWARD,
    facts=spec.swiglu_facts,
    fake=_forward_fake,
    public="swiglu and geglu",
    save=_save,
    differentiate=_differentiate,
)

# What api.py calls.
gated = PlainCalls(kernels.FORWARD, forward.body, forward)
