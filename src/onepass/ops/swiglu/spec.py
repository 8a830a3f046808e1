"""The facts a kernel of swiglu and geglu is chosen by, and the checks that keep memory safe."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class SwigluSpec(NamedTuple):
    """Facts of one call of swiglu or geglu, or of their backward."""

    arch: str
    dtype: torch.dtype
    activation: str


def swiglu_facts(gate: Tensor, up: Tensor, activation: str) -> tuple[Any, ...]:
    """Checks a call of swiglu_fwd; the fields of its SwigluSpec. Raises ValueError or TypeError naming the argument."""
    if not (gate.dim() > 0 and gate.dtype.is_floating_point):
        raise _gate_error(gate)
    if up.shape != gate.shape or up.dtype is not gate.dtype or up.device != gate.device:
        raise _like_gate_error("up", up, gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return device.arch(gate), gate.dtype, activation


def backward_facts(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Any, ...]:
    """Checks a call of swiglu_bwd; the fields of its SwigluSpec."""
    facts = swiglu_facts(gate, up, activation)
    if dout.shape != gate.shape or dout.dtype is not gate.dtype or dout.device != gate.device:
        raise _like_gate_error("dout", dout, gate)
    return facts


def _gate_error(gate: Tensor) -> Exception:
    if not gate.dtype.is_floating_point:
        return TypeError(f"gate must be floating point, got {checks.describe(gate)}")
    return ValueError(f"gate must be (..., columns), got {checks.shape(gate)}")


def _like_gate_error(name: str, tensor: Tensor, gate: Tensor) -> Exception:
    if tensor.dtype is not gate.dtype:
        return TypeError(
            f"{name} must have gate's dtype {str(gate.dtype).removeprefix('torch.')}, got {checks.describe(tensor)}"
        )
    if tensor.device != gate.device:
        return ValueError(f"{name} must be on gate's device {gate.device}, got {checks.describe(tensor)}")
    return ValueError(f"{name} must have gate's shape {checks.shape(gate)}, got {checks.shape(tensor)}")
