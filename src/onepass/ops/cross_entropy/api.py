"""cross_entropy and linear_cross_entropy: defaults, shapes as rows, and checks of the options."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from onepass.core import checks, torch_compat
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.cross_entropy import kernels, linear_registration, registration, spec

_HINTS = {
    "weight": "class weights are not supported",
    "size_average": "use reduction='mean' or 'sum'",
    "reduce": "use reduction='none'",
    "lse_square_scale": "use z_loss=",
    "logit_softcapping": "use softcap=",
    "return_z_loss": "use return_lse=True: the z-loss of a row is z_loss * lse^2",
}


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """lse - (1 - e) * x[target] - e * mean(x) + z_loss * lse^2 for each row, e = label_smoothing.

    x are the logits, capped where softcap says so, and lse = log(sum(exp(x))), found in one pass over the row
    (Milakov and Gimelshein 2018). Label smoothing is that of Szegedy et al. 2016, z_loss that of Chowdhery et al. 2022.

    Args:
        logits: (..., classes), floating point, classes last, at least 1. Read in place when its leading dimensions
            have one stride between rows; other strides are copied first.
        target: (...), integer: a class for each row, or ignore_index.
        ignore_index: rows with this target have loss 0, are not counted and receive no gradient.
        label_smoothing: 0 to 1.
        z_loss: the weight of lse^2, at least 0.
        softcap: when above 0, x = softcap * tanh(logits / softcap).
        reduction: "mean" over the rows that count, "sum", or "none".
        return_lse: also return lse, of ignored rows too; differentiable.
        backend: a backend's name, which then never falls back; None chooses.

    Returns:
        loss, fp32 whatever logits' dtype, () or with reduction="none" (...); with return_lse the pair (loss, lse), lse
        fp32 (...). The gradient comes in logits' dtype, deterministically. When no row counts the mean is NaN, as in
        PyTorch, and the gradient 0. Nonfinite logits make their own row NaN where PyTorch's are, and no other.

    Raises:
        ValueError: shapes, devices or options contradict. TypeError: a wrong dtype or type.
        IndexError: a target is no class, on the CPU. On a GPU that row's loss and gradient are NaN.
        onepass.UnsupportedError: no backend can do this call.
    """
    if unknown:
        raise checks.unknown_argument(cross_entropy, next(iter(unknown)), _HINTS)
    call = _canonical(logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction, return_lse, backend)
    found = registration.cross_entropy(*call, return_lse)
    loss, lse = found if return_lse else (found, None)
    return _shaped(loss, lse, target, reduction, return_lse)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    low_memory: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """cross_entropy(x @ weight^T + bias, target) without ever holding all logits (Wijmans et al. 2024 have the idea).

    For "mean" and "sum" the gradients are made in the forward, a strip of rows at a time: three matrix products, and
    the weight's gradient is held from then on. With low_memory, reduction="none" or return_lse the forward keeps lse
    alone and the backward makes the logits again, a strip of classes at a time: four products, the least memory.

    Args:
        x: (..., features), floating point; logits have its dtype.
        weight: (classes, features), floating point; a dtype other than x's is converted for the products.
        target: (...), integer: a class for each row, or ignore_index.
        bias: (classes,), floating point, added to the logits; None: none.
        low_memory: time for memory, as above.
        ignore_index, label_smoothing, z_loss, softcap, reduction, return_lse, backend: as in `cross_entropy`; the
            backend is that of the cross-entropy, the products are PyTorch's.

    Returns and raises as `cross_entropy` does. Gradients of x, weight and bias come in their dtypes; that of the weight
    is accumulated in fp32 and rounded once. Under autocast x, weight and bias are cast as linear casts them.
    """
    if unknown:
        raise checks.unknown_argument(linear_cross_entropy, next(iter(unknown)), _HINTS)
    call = _linear_canonical(
        x,
        weight,
        target,
        bias,
        low_memory,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        return_lse,
        backend,
    )
    loss, lse = linear_registration.linear_cross_entropy(call)
    return _shaped(loss, lse, target, reduction, return_lse)


def _shaped(loss: Tensor, lse: Tensor | None, target: Tensor, reduction: str, return_lse: bool) -> Any:
    """Rows back in target's shape."""
    if target.dim() != 1:
        loss = loss.view(target.shape) if reduction == "none" else loss
        lse = lse.view(target.shape) if lse is not None else lse
    return (loss, lse) if return_lse else loss


def _canonical(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    return_lse: bool,
    backend: str | None,
) -> tuple[Any, ...]:
    """The arguments of the operation cross_entropy_fwd."""
    logits, target = _as_rows("logits", "classes", logits, target)
    options = _options(ignore_index, label_smoothing, z_loss, softcap, reduction, return_lse)
    return logits, target, *options, backend_in_use() if backend is None else backend


def _linear_canonical(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    low_memory: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    return_lse: bool,
    backend: str | None,
) -> tuple[Any, ...]:
    """The arguments of the operation linear_cross_entropy_fwd."""
    checks.require_tensors(x=x, weight=weight, target=target, bias=bias)
    checks.require_bool("low_memory", low_memory)
    x, target = _as_rows("x", "features", x, target)
    options = _options(ignore_index, label_smoothing, z_loss, softcap, reduction, return_lse)
    if torch_compat.autocast_enabled(x):
        dtype = torch_compat.autocast_dtype(x)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    differentiable = torch.is_grad_enabled()
    now = reduction != "none" and not low_memory and not return_lse
    return (
        x,
        weight,
        bias,
        target,
        *options,
        now,
        differentiable and x.requires_grad,
        differentiable and weight.requires_grad,
        differentiable and bias is not None and bias.requires_grad,
        backend_in_use() if backend is None else backend,
    )


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x


def _as_rows(name: str, last: str, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) and (rows,)."""
    if not (isinstance(x, Tensor) and isinstance(target, Tensor)):
        checks.require_tensors(**{name: x, "target": target})
    if x.dim() == 2 and target.dim() == 1 and target.dtype is torch.int64:
        return x, target
    if x.dim() == 0 or target.shape != x.shape[:-1]:
        if target.dtype.is_floating_point and target.shape == x.shape:
            raise spec.target_error(target, x, ())
        raise ValueError(
            f"target must be (...) for {name} (..., {last}), {last} last, got target {checks.shape(target)} and "
            f"{name} {checks.shape(x)}"
        )
    if target.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        target = target.long()
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(target.numel(), 0), target.reshape(-1)


def _options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, return_lse: bool
) -> tuple[int, float, float, float, str]:
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, as targets do, got {ignore_index}")
    if reduction not in spec.REDUCTIONS:
        raise spec.reduction_error(reduction)
    if type(return_lse) is not bool:
        checks.require_bool("return_lse", return_lse)
    if label_smoothing != 0.0:
        label_smoothing = checks.finite_float("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be 0 to 1, got {label_smoothing}")
    if z_loss != 0.0:
        z_loss = _at_least_zero("z_loss", z_loss)
    if softcap != 0.0:
        softcap = _at_least_zero("softcap", softcap)
    return ignore_index, float(label_smoothing), float(z_loss), float(softcap), reduction


def _at_least_zero(name: str, value: Any) -> float:
    number = checks.finite_float(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return number


# What `explain` asks.


def _choices(facts: tuple[Any, ...], backend: str, backward: bool) -> list[Choice]:
    choices = [choose(kernels.FORWARD, facts, backend)]
    return [*choices, choose(kernels.BACKWARD, facts, backend)] if backward else choices


@explains("cross_entropy")
def _explain(logits: Tensor, target: Tensor, **options: Any) -> list[Choice]:
    *arguments, name = _canonical(**checks.arguments_of(cross_entropy, _HINTS, logits, target, **options))
    return _choices(spec.forward_facts(*arguments), name, torch.is_grad_enabled() and logits.requires_grad)


@explains("linear_cross_entropy")
def _explain_linear(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> list[Choice]:
    given = checks.arguments_of(linear_cross_entropy, _HINTS, x, weight, target, **options)
    *arguments, name = _linear_canonical(**given)
    return _choices(spec.linear_facts(*arguments), name, any(arguments[-3:]))
