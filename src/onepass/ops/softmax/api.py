"""softmax: checks of the arguments."""

from typing import NoReturn

import torch
from torch import Tensor

from onepass.core import checks, torch_compat
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.softmax import kernels, registration, spec

_HINTS = {
    "dim": "softmax is over the last dimension; move another there with x.movedim(dim, -1)",
    "axis": "softmax is over the last dimension; move another there with x.movedim(axis, -1)",
    "dtype": "the result has x's dtype, its sums are fp32; convert with x.to(dtype)",
}


def softmax(x: Tensor, *, backend: str | None = None, **unknown: NoReturn) -> Tensor:
    """exp(x - max(x)) / sum(exp(x - max(x))) over the last dimension.

    Maximum and sum are found in one pass over the row (Milakov and Gimelshein 2018).

    Args:
        x: (..., columns), floating point, at least 1 column, any strides, any number of rows (0 too).
        backend: a backend's name, which then never falls back; None chooses.

    Returns:
        y in x's shape and dtype, contiguous; sums are fp32. Differentiable, deterministically. A row of -inf alone, or
        one that holds NaN or +inf, is NaN, as in PyTorch; other rows do not see it. Under autocast on a GPU
        half-precision inputs give fp32, as torch.softmax does.

    Raises:
        ValueError: no columns. TypeError: x is not floating point.
        onepass.UnsupportedError: no backend can do this call.
    """
    if unknown:
        raise checks.unknown_argument(softmax, next(iter(unknown)), _HINTS)
    return registration.softmax(*_canonical(x, backend))


def _canonical(x: Tensor, backend: str | None) -> tuple[Tensor, str]:
    """The arguments of the operation softmax_fwd."""
    if not isinstance(x, Tensor):
        checks.require_tensor("x", x)
    # PyTorch's autocast runs softmax in fp32 on GPUs and leaves it alone on CPUs.
    if torch_compat.autocast_enabled(x) and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return x, backend_in_use() if backend is None else backend


@explains("softmax")
def _explain(x: Tensor, *, backend: str | None = None) -> list[Choice]:
    """What `explain` asks."""
    x, name = _canonical(x, backend)
    choices = [choose(kernels.FORWARD, spec.softmax_facts(x), name)]
    if torch.is_grad_enabled() and x.requires_grad:
        choices.append(choose(kernels.BACKWARD, spec.softmax_facts(x), name))
    return choices
