"""repeat_kv: defaults and checks of the options."""

from typing import NoReturn

import torch
from torch import Tensor

from onepass.core import checks
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.repeat_kv import kernels, registration, spec

_HINTS = {
    "dim": "heads are x's third dimension; pass a (b, h, s, d) tensor as x.transpose(1, 2)",
    "repeats": "did you mean n_rep?",
}


def repeat_kv(x: Tensor, n_rep: int, *, backend: str | None = None, **unknown: NoReturn) -> Tensor:
    """Each key or value head n_rep times in a row: `x.repeat_interleave(n_rep, dim=2)`.

    `onepass.attention` takes fewer key than query heads as they are; this is for code that cannot.

    Args:
        x: (batch, seqlen, nheads_kv, head_dim), floating point, any strides, read in place.
        n_rep: query heads for each key head, at least 1.
        backend: a backend's name, which then never falls back; None chooses.

    Returns:
        (batch, seqlen, nheads_kv * n_rep, head_dim), x's dtype, contiguous; head h is x's head h // n_rep. The gradient
        adds the n_rep heads of a group in fp32, in order, and is rounded once.

    Raises:
        ValueError: a wrong shape or n_rep. TypeError: a wrong dtype or type.
        onepass.UnsupportedError: no backend can do this call.
    """
    if unknown:
        raise checks.unknown_argument(repeat_kv, next(iter(unknown)), _HINTS)
    return registration.repeated(*_canonical(x, n_rep, backend))


_MOST = 2**31 - 1


def _canonical(x: Tensor, n_rep: int, backend: str | None) -> tuple[Tensor, int, str]:
    """The arguments of the operation repeat_kv_fwd."""
    checks.require_tensor("x", x)
    if isinstance(n_rep, bool) or not isinstance(n_rep, (int, torch.SymInt)):
        raise TypeError(f"n_rep must be an int, got {n_rep!r}")
    if isinstance(n_rep, int) and n_rep > _MOST:
        raise ValueError(f"n_rep must be at most {_MOST}, got {n_rep}")
    return x, n_rep, backend_in_use() if backend is None else backend


# What `explain` asks.


@explains("repeat_kv")
def _explain(x: Tensor, n_rep: int, *, backend: str | None = None) -> list[Choice]:
    x, n_rep, named = _canonical(x, n_rep, backend)
    facts = spec.repeat_kv_facts(x, n_rep)
    choices = [choose(kernels.FORWARD, facts, named)]
    if torch.is_grad_enabled() and x.requires_grad:
        choices.append(choose(kernels.BACKWARD, facts, named))
    return choices
