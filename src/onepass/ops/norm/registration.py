"""The norms' operations in torch.library; rms_norm and layer_norm are one, told apart by `center`."""

from typing import Any

import torch
from torch import Tensor

from onepass.core.operation import Operation
from onepass.core.registry import select
from onepass.core.replay import PlainCalls
from onepass.ops.norm import kernels, spec

Tensors = tuple[Tensor, ...]


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> Tensors:
    statistics = spec.statistics_dtype(spec.sum_dtype(x, residual))
    rstd = x.new_empty(x.shape[:-1], dtype=statistics)
    return (
        x.new_empty(x.shape),
        x.new_empty((0,)) if residual is None else x.new_empty(x.shape, dtype=spec.sum_dtype(x, residual)),
        rstd.new_empty(rstd.shape if center else (0,)),
        rstd,
    )


def _backward_fake(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    center: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> Tensors:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty((0,)) if weight is None or not need_dweight else weight.new_empty(weight.shape),
        x.new_empty((0,)) if bias is None or not need_dbias else bias.new_empty(bias.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensors) -> None:
    x, weight, bias, residual, _, offset, center, backend = inputs
    _, residual_out, mean, rstd = outputs
    ctx.save_for_backward(x if residual is None else residual_out, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.options = offset, center, backend
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dresidual: Tensor | None, *statistics: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None and dresidual is None:
        return (None,) * 8
    x, weight, bias, mean, rstd = ctx.saved_tensors
    offset, center, backend = ctx.options
    x_dtype, residual_dtype = ctx.dtypes
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    if dy is None:
        dy = torch.zeros_like(x, dtype=x_dtype)
    dx, dweight, dbias = backward(
        dy,
        None if residual_dtype is None else dresidual,
        x,
        weight,
        bias,
        mean,
        rstd,
        offset,
        center,
        need_x or need_residual,
        need_weight,
        need_bias,
        backend,
    )
    return (
        dx.to(x_dtype) if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dx.to(residual_dtype) if need_residual else None,
        None,
        None,
        None,
        None,
    )


backward = Operation(
    "norm_bwd(Tensor dy, Tensor? dresidual, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "float offset, bool center, bool need_dx, bool need_dweight, bool need_dbias, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    table=kernels.BACKWARD,
    facts=spec.backward_facts,
    fake=_backward_fake,
    public="rms_norm and layer_norm",
)
forward = Operation(
    "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, float offset, bool center, "
    "str backend) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    table=kernels.FORWARD,
    facts=spec.norm_facts,
    fake=_forward_fake,
    public="rms_norm and layer_norm",
    save=_save,
    differentiate=_differentiate,
)


# What api.py calls: y, or y and residual_out where there is a residual.


def _launch(*call: Any) -> Tensor | Tensors:
    *arguments, backend = call
    launcher = select(kernels.FORWARD, spec.norm_facts(*arguments), backend)
    return _asked(call, launcher(*arguments, statistics=False))


def _dispatched(*call: Any) -> Tensor | Tensors:
    return _asked(call, forward(*call))


def _asked(call: tuple[Any, ...], outputs: Tensors) -> Tensor | Tensors:
    return outputs[0] if call[3] is None else outputs[:2]


norm = PlainCalls(kernels.FORWARD, _launch, _dispatched)
