"""rope's operation in torch.library. Its gradient is itself with `inverse` the other way round, any number of times."""

from typing import Any

from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.replay import PlainCalls
from onepass.ops.rope import kernels, spec


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    cos, sin, position_ids, interleaved, inverse, backend = inputs[2:]
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.options = interleaved, not inverse, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        dq_out = None
    if not ctx.needs_input_grad[1]:
        dk_out = None
    # What is not needed goes along with no heads, which costs nothing.
    if dq_out is not None:
        dq, dk = forward(dq_out, _no_heads(dq_out) if dk_out is None else dk_out, *ctx.saved_tensors, *ctx.options)
    elif dk_out is not None:
        dq, dk = forward(_no_heads(dk_out), dk_out, *ctx.saved_tensors, *ctx.options)
    else:
        dq, dk = None, None
    return dq if dq_out is not None else None, dk if dk_out is not None else None, None, None, None, None, None, None


def _no_heads(x: Tensor) -> Tensor:
    batch, seqlen, _, head_dim = x.shape
    return x.new_empty((batch, seqlen, 0, head_dim))


forward = Operation(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse, "
    "str backend) -> (Tensor q_out, Tensor k_out)",
    table=kernels.FORWARD,
    facts=spec.rope_facts,
    fake=_fake,
    public="rope",
    save=_save,
    differentiate=_differentiate,
)

# What api.py calls.
rotated = PlainCalls(kernels.FORWARD, forward.body, forward)
