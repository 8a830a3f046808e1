"""The facts a kernel of repeat_kv is chosen by, and the checks that keep memory safe."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device

_DIMS = 4  # of x


class RepeatKvSpec(NamedTuple):
    """Facts of one call of repeat_kv, or of its backward."""

    arch: str
    dtype: torch.dtype


def repeat_kv_facts(x: Tensor, n_rep: int) -> tuple[Any, ...]:
    """Checks a call of repeat_kv_fwd; the fields of its spec. Raises ValueError or TypeError naming the argument."""
    if not (x.dim() == _DIMS and x.dtype.is_floating_point):
        raise _error("x", "nheads_kv", x)
    if n_rep < 1:
        raise ValueError(f"n_rep must be at least 1, got {n_rep}")
    return device.arch(x), x.dtype


def backward_facts(dout: Tensor, n_rep: int) -> tuple[Any, ...]:
    """Checks a call of repeat_kv_bwd; the fields of its spec."""
    if not (dout.dim() == _DIMS and dout.dtype.is_floating_point):
        raise _error("dout", "nheads_kv * n_rep", dout)
    if n_rep < 1 or dout.shape[2] % n_rep:
        raise ValueError(f"n_rep must be at least 1 and divide dout's {dout.shape[2]} heads, got {n_rep}")
    return device.arch(dout), dout.dtype


def _error(name: str, heads: str, x: Tensor) -> Exception:
    if not x.dtype.is_floating_point:
        return TypeError(f"{name} must be floating point, got {checks.describe(x)}")
    return ValueError(f"{name} must be (batch, seqlen, {heads}, head_dim), got {checks.shape(x)}")
