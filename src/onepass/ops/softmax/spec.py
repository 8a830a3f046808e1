"""The facts a softmax kernel is chosen by, and the checks that keep memory safe."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device


class SoftmaxSpec(NamedTuple):
    """Facts of one call of softmax, or of its backward."""

    arch: str
    dtype: torch.dtype


def softmax_facts(x: Tensor) -> tuple[Any, ...]:
    """Checks a call of softmax_fwd; the fields of its spec. ValueError or TypeError naming the argument."""
    if not (x.dim() > 0 and x.shape[-1] > 0 and x.dtype.is_floating_point):
        raise _rows_error("x", x)
    return device.arch(x), x.dtype


def backward_facts(dy: Tensor, y: Tensor) -> tuple[Any, ...]:
    """Checks a call of softmax_bwd; the fields of its SoftmaxSpec."""
    if not (y.dim() > 0 and y.shape[-1] > 0 and y.dtype.is_floating_point):
        raise _rows_error("y", y)
    if dy.shape != y.shape or dy.dtype is not y.dtype or dy.device != y.device:
        raise ValueError(f"dy must be as y is, {checks.describe(y)}, got {checks.describe(dy)}")
    return device.arch(y), y.dtype


def _rows_error(name: str, x: Tensor) -> Exception:
    if not x.dtype.is_floating_point:
        return TypeError(f"{name} must be floating point, got {checks.describe(x)}: convert it with {name}.float()")
    return ValueError(f"{name} must be (..., columns) with at least 1 column, got {checks.shape(x)}")
