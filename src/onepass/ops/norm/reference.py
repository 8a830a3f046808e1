"""The definition of the norms in plain PyTorch, their backward written out; used only when asked for by name.

z = x + residual (rounded to its dtype)         xhat = (z - mean) * rstd,   rstd = (mean((z - mean)^2) + eps)^-1/2
y = xhat * (weight + offset) + bias             rms_norm: mean = 0

g = dy * (weight + offset)                      dz = rstd * (g - xhat * mean(g * xhat) - mean(g)) + dresidual
dweight = sum over rows of dy * xhat            dbias = sum over rows of dy;   rms_norm: without mean(g)
"""

import torch
from torch import Tensor

from onepass.core.torch_compat import without_autocast
from onepass.ops.norm.spec import statistics_dtype, sum_dtype

Tensors = tuple[Tensor, ...]


@without_autocast()
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    statistics: bool = True,
) -> Tensors:
    """y in x's dtype, residual_out (empty without residual), mean (empty unless center), rstd."""
    z = x if residual is None else (x.to(_wide(x)) + residual.to(_wide(x))).to(sum_dtype(x, residual))
    wide = z.to(_wide(z))
    mean = wide.mean(-1) if center else wide.new_empty(0)
    centred = wide - mean.unsqueeze(-1) if center else wide
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = _affine(centred * rstd.unsqueeze(-1), weight, bias, offset)
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else z.contiguous(), mean, rstd


@without_autocast()
def backward(
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
    """dx (of x + residual, where one was given), dweight, dbias; empty where not needed."""
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    wide, grad = x.to(_wide(x)), dy.to(_wide(x))
    xhat = (wide - mean.unsqueeze(-1) if center else wide) * rstd.unsqueeze(-1)
    if need_dx:
        g = _affine(grad, weight, None, offset)
        dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
        if center:
            dx = dx - g.mean(-1, keepdim=True)
        dx = dx * rstd.unsqueeze(-1)
        if dresidual is not None:
            dx = dx + dresidual
        dx = dx.to(x.dtype).contiguous()
    if need_dweight and weight is not None:
        dweight = _over_rows(grad * xhat).to(weight.dtype)
    if need_dbias and bias is not None:
        dbias = _over_rows(grad).to(bias.dtype)
    return dx, dweight, dbias


def _wide(x: Tensor) -> torch.dtype:
    return statistics_dtype(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> Tensor:
    if weight is not None:
        x = x * (weight.to(x.dtype) + offset)
    return x if bias is None else x + bias


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)
