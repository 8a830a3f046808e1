"""swiglu and geglu: defaults and checks of the options."""

from typing import NoReturn

import torch
from torch import Tensor

from onepass.core import checks
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.swiglu import kernels, registration, spec

_HINTS = {
    "dim": "gate and up are two tensors: gate, up = x.chunk(2, dim)",
    "inplace": "inputs are never modified",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None, **unknown: NoReturn) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, "GLU Variants Improve Transformer").

    Args:
        gate, up: (..., columns), one shape, dtype and device; floating point, any strides. The two halves of one
            projection, `gate, up = x.chunk(2, -1)`, are read in place.
        backend: a backend's name, which then never falls back; None chooses.

    Returns:
        out in gate's shape and dtype, contiguous. Computed in fp32 and rounded once. Both inputs are differentiable,
        deterministically; the backward computes the activation again and saves nothing but gate and up.

    Raises:
        ValueError: shapes or devices contradict. TypeError: a wrong dtype or type.
        onepass.UnsupportedError: no backend can do this call.
    """
    if unknown:
        raise checks.unknown_argument(swiglu, next(iter(unknown)), _HINTS)
    return registration.gated(*_canonical(gate, up, "silu", backend))


def geglu(
    gate: Tensor, up: Tensor, *, approximate: str = "none", backend: str | None = None, **unknown: NoReturn
) -> Tensor:
    """gelu(gate) * up, elementwise (Shazeer 2020); all else is as for `swiglu`.

    `approximate` is that of torch.nn.functional.gelu: "none" (by erf) or "tanh".
    """
    if unknown:
        raise checks.unknown_argument(geglu, next(iter(unknown)), _HINTS)
    return registration.gated(*_canonical(gate, up, _gelu(approximate), backend))


def _gelu(approximate: str) -> str:
    if approximate not in _GELUS:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _GELUS[approximate]


def _canonical(gate: Tensor, up: Tensor, activation: str, backend: str | None) -> tuple[Tensor, Tensor, str, str]:
    """The arguments of the operation swiglu_fwd."""
    checks.require_tensor("gate", gate)
    checks.require_tensor("up", up)
    return gate, up, activation, backend_in_use() if backend is None else backend


# What `explain` asks.


def _explain(gate: Tensor, up: Tensor, activation: str, backend: str) -> list[Choice]:
    facts = spec.swiglu_facts(gate, up, activation)
    choices = [choose(kernels.FORWARD, facts, backend)]
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        choices.append(choose(kernels.BACKWARD, facts, backend))
    return choices


@explains("swiglu")
def _explain_swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> list[Choice]:
    return _explain(*_canonical(gate, up, "silu", backend))


@explains("geglu")
def _explain_geglu(gate: Tensor, up: Tensor, *, approximate: str = "none", backend: str | None = None) -> list[Choice]:
    return _explain(*_canonical(gate, up, _gelu(approximate), backend))
