"""rms_norm and layer_norm: defaults and checks of the options."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from onepass.core import checks, torch_compat
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.norm import kernels, registration, spec

_HINTS = {
    "normalized_shape": "the norm is over the last dimension; flatten several with x.flatten(-n)",
    "variance_epsilon": "use eps=",
    "elementwise_affine": "pass weight (and bias), or None for none",
}


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """(weight + offset) * x * rsqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: (..., columns), floating point, any strides.
        weight: (columns,), floating point, any dtype; None: no scaling.
        offset: added to the weight (1.0 for Gemma's weights).
        residual: x's shape; the norm is then of residual_out = x + residual, rounded to the promoted dtype.
        backend: a backend's name, which then never falls back; None chooses.

    Returns:
        y in x's shape and dtype, contiguous; with a residual the pair (y, residual_out). Statistics are fp32. All
        inputs are differentiable, deterministically.

    Raises:
        ValueError: shapes, devices or options contradict. TypeError: a wrong dtype or type.
        onepass.UnsupportedError: no backend can do this call.
    """
    if unknown:
        raise checks.unknown_argument(rms_norm, next(iter(unknown)), _HINTS)
    return _norm(x, weight, None, residual, eps, offset, False, backend)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """weight * (x - mean(x)) * rsqrt(var(x) + eps) + bias over the last dimension, biased variance (Ba et al. 2016).

    Args:
        x: (..., columns), floating point, any strides.
        weight, bias: (columns,), floating point, any dtype; None: no scaling, no shift.
        residual: x's shape; the norm is then of residual_out = x + residual, rounded to the promoted dtype.
        backend: a backend's name, which then never falls back; None chooses.

    Returns and raises as `rms_norm` does.
    """
    if unknown:
        raise checks.unknown_argument(layer_norm, next(iter(unknown)), _HINTS)
    return _norm(x, weight, bias, residual, eps, 0.0, True, backend)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    backend: str | None,
) -> Any:
    call = _canonical(x, weight, bias, residual, eps, offset, center, backend)
    return registration.norm(*call)


def _canonical(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    backend: str | None,
) -> tuple[Any, ...]:
    """The arguments of the operation norm_fwd."""
    if not (
        isinstance(x, Tensor)
        and (weight is None or isinstance(weight, Tensor))
        and (bias is None or isinstance(bias, Tensor))
        and (residual is None or isinstance(residual, Tensor))
    ):
        checks.require_tensors(x=x, weight=weight, bias=bias, residual=residual)
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        eps = checks.finite_float("eps", eps)
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
    if offset != 0.0:
        offset = checks.finite_float("offset", offset)
        if weight is None:
            raise ValueError(f"offset is added to the weight, and there is none: got offset {offset} and weight None")
    if x.is_cuda and torch_compat.autocast_enabled(x):  # as PyTorch's norms, which autocast leaves alone on the CPU
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x, weight, bias, residual, eps, float(offset), center, backend_in_use() if backend is None else backend


# What `explain` asks.


def _explain(call: tuple[Any, ...]) -> list[Choice]:
    *arguments, backend = call
    choices = [choose(kernels.FORWARD, spec.norm_facts(*arguments), backend)]
    differentiable = [x for x in arguments[:4] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        choices.append(choose(kernels.BACKWARD, spec.norm_facts(*arguments), backend))
    return choices


@explains("rms_norm")
def _explain_rms_norm(x: Tensor, weight: Tensor | None = None, **options: Any) -> list[Choice]:
    given = checks.arguments_of(rms_norm, _HINTS, x, weight, **options)
    return _explain(_canonical(**given, bias=None, center=False))


@explains("layer_norm")
def _explain_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> list[Choice]:
    given = checks.arguments_of(layer_norm, _HINTS, x, weight, bias, **options)
    return _explain(_canonical(**given, offset=0.0, center=True))
