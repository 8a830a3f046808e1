"""The facts a norm kernel is chosen by, and the checks that keep memory safe."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device


class NormSpec(NamedTuple):
    """Facts of one call of rms_norm or layer_norm, or of their backward."""

    arch: str
    dtype: torch.dtype
    center: bool  # layer_norm subtracts the mean
    weight_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, except that fp64 inputs (the reference alone takes them) keep fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of x + residual."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def norm_facts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> tuple[Any, ...]:
    """Checks a call of norm_fwd; the fields of its NormSpec. Raises ValueError or TypeError naming the argument."""
    if not (x.dim() > 0 and x.shape[-1] > 0 and x.dtype.is_floating_point):
        raise _x_error(x)
    columns = x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (
            tensor.shape != (columns,) or not tensor.dtype.is_floating_point or tensor.device != x.device
        ):
            raise _parameter_error(name, tensor, x)
    if residual is not None and (
        residual.shape != x.shape or not residual.dtype.is_floating_point or residual.device != x.device
    ):
        raise _residual_error(residual, x)
    return (
        device.arch(x),
        x.dtype,
        center,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        None if residual is None else residual.dtype,
    )


def backward_facts(
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
) -> tuple[Any, ...]:
    """Checks a call of norm_bwd; the fields of its NormSpec."""
    facts = norm_facts(x, weight, bias, dresidual, 0.0, offset, center)
    rows = x.shape[:-1]
    wanted = [("dy", dy, x.shape, None), ("rstd", rstd, rows, statistics_dtype(x.dtype))]
    if center:
        wanted.append(("mean", mean, rows, statistics_dtype(x.dtype)))
    for name, tensor, sizes, dtype in wanted:
        if (
            tensor.shape != sizes
            or tensor.device != x.device
            or not tensor.dtype.is_floating_point
            or (dtype is not None and tensor.dtype is not dtype)
        ):
            expected = f"{dtype or 'floating point'} {tuple(sizes)} on {x.device}"
            raise ValueError(f"{name} must be {expected}, got {checks.describe(tensor)}")
    return facts


def _x_error(x: Tensor) -> Exception:
    if not x.dtype.is_floating_point:
        return TypeError(f"x must be floating point, got {checks.describe(x)}")
    return ValueError(f"x must be (..., columns) with at least 1 column, got {checks.shape(x)}")


def _parameter_error(name: str, tensor: Tensor, x: Tensor) -> Exception:
    if not tensor.dtype.is_floating_point:
        return TypeError(f"{name} must be floating point, got {checks.describe(tensor)}")
    if tensor.device != x.device:
        return ValueError(f"{name} must be on x's device {x.device}, got {checks.describe(tensor)}")
    return ValueError(f"{name} must be (columns,) = ({x.shape[-1]},), got {checks.shape(tensor)}")


def _residual_error(residual: Tensor, x: Tensor) -> Exception:
    if not residual.dtype.is_floating_point:
        return TypeError(f"residual must be floating point, got {checks.describe(residual)}")
    if residual.device != x.device:
        return ValueError(f"residual must be on x's device {x.device}, got {checks.describe(residual)}")
    return ValueError(f"residual must have x's shape {checks.shape(x)}, got {checks.shape(residual)}")
