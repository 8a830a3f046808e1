"""repeat_kv's operations in torch.library."""

from typing import Any

from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.replay import PlainCalls
from onepass.ops.repeat_kv import kernels, spec


def _forward_fake(x: Tensor, n_rep: int) -> Tensor:
    batch, seqlen, heads, head_dim = x.shape
    return x.new_empty((batch, seqlen, heads * n_rep, head_dim))


def _backward_fake(dout: Tensor, n_rep: int) -> Tensor:
    batch, seqlen, heads, head_dim = dout.shape
    return dout.new_empty((batch, seqlen, heads // n_rep, head_dim))


def _save(ctx: Any, inputs: tuple[Any, ...], out: Tensor) -> None:
    _, ctx.n_rep, ctx.backend = inputs


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return backward(dout, ctx.n_rep, ctx.backend), None, None


backward = Operation(
    "repeat_kv_bwd(Tensor dout, SymInt n_rep, str backend) -> Tensor dx",
    table=kernels.BACKWARD,
    facts=spec.backward_facts,
    fake=_backward_fake,
    public="repeat_kv",
)
forward = Operation(
    "repeat_kv_fwd(Tensor x, SymInt n_rep, str backend) -> Tensor out",
    table=kernels.FORWARD,
    facts=spec.repeat_kv_facts,
    fake=_forward_fake,
    public="repeat_kv",
    save=_save,
    differentiate=_differentiate,
)

# What api.py calls.
repeated = PlainCalls(kernels.FORWARD, forward.body, forward)
