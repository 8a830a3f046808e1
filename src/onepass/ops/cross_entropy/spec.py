"""The facts a cross-entropy kernel is chosen by, and the checks that keep memory safe."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from onepass.core import checks, device

REDUCTIONS = ("mean", "sum", "none")


class CrossEntropySpec(NamedTuple):
    """Facts of one call of cross_entropy, of its backward, or of one strip of logits of linear_cross_entropy."""

    arch: str
    dtype: torch.dtype


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, except that fp64 logits (the reference alone takes them) keep fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def forward_facts(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Any, ...]:
    """Checks a call of cross_entropy_fwd; the fields of its spec. ValueError or TypeError naming the argument."""
    if not (logits.dim() == 2 and logits.shape[1] > 0 and logits.dtype.is_floating_point):
        raise _logits_error(logits)
    if target.shape != logits.shape[:1] or target.dtype is not torch.int64 or target.device != logits.device:
        raise target_error(target, logits, (logits.shape[0],))
    if reduction not in REDUCTIONS:
        raise reduction_error(reduction)
    return device.arch(logits), logits.dtype


def backward_facts(
    dloss: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Any, ...]:
    """Checks a call of cross_entropy_bwd; the fields of its spec."""
    facts = forward_facts(logits, target, ignore_index, label_smoothing, z_loss, softcap, "none")
    require_rows(logits, dloss=dloss, dlse=dlse, lse=lse)
    return facts


def linear_facts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    now: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Any, ...]:
    """Checks a call of linear_cross_entropy_fwd; the fields of the spec of its strips of logits."""
    if not (x.dim() == 2 and x.shape[1] > 0 and x.dtype.is_floating_point):
        raise _x_error(x)
    if not (
        weight.dim() == 2
        and weight.shape[0] > 0
        and weight.shape[1] == x.shape[1]
        and weight.dtype.is_floating_point
        and weight.device == x.device
    ):
        raise _parameter_error("weight", weight, x, "(classes, features)", f"(classes, {x.shape[1]})")
    if bias is not None and not (
        bias.shape == weight.shape[:1] and bias.dtype.is_floating_point and bias.device == x.device
    ):
        raise _parameter_error("bias", bias, x, "(classes,)", f"({weight.shape[0]},)")
    if target.shape != x.shape[:1] or target.dtype is not torch.int64 or target.device != x.device:
        raise target_error(target, x, (x.shape[0],))
    if reduction not in REDUCTIONS:
        raise reduction_error(reduction)
    return device.arch(x), x.dtype


def linear_backward_facts(
    dloss: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Any, ...]:
    """Checks a call of linear_cross_entropy_bwd; the fields of the spec of its strips of logits."""
    facts = linear_facts(
        x,
        weight,
        bias,
        target,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        "none",
        False,
        need_dx,
        need_dweight,
        need_dbias,
    )
    require_rows(x, dloss=dloss, dlse=dlse, lse=lse)
    return facts


def require_rows(like: Tensor, **values: Tensor | None) -> None:
    """Each a number for each of like's rows."""
    dtype = loss_dtype(like.dtype)
    for name, tensor in values.items():
        if tensor is not None and (
            tensor.shape != like.shape[:1] or tensor.dtype is not dtype or tensor.device != like.device
        ):
            expected = f"{str(dtype).removeprefix('torch.')} ({like.shape[0]},) on {like.device}"
            raise ValueError(f"{name} must be {expected}, got {checks.describe(tensor)}")


def require_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError when a target on the CPU is no class and not ignore_index; a GPU is not waited for."""
    if not target.is_cpu or target.numel() == 0:
        return
    low, high = target.aminmax()
    if low >= 0 and high < classes:
        return
    if _is_wrong(target, classes, ignore_index).any():
        raise wrong_target_error(target, classes, ignore_index)


def wrong_target_error(target: Tensor, classes: int, ignore_index: int) -> IndexError:
    """For targets (rows,) of which some are no class and not ignore_index."""
    place = int(_is_wrong(target, classes, ignore_index).nonzero()[0])
    return IndexError(
        f"target must hold classes, 0 to {classes - 1}, or ignore_index {ignore_index}; "
        f"element {place} of the flattened target is {int(target[place])}"
    )


def _is_wrong(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    return ((target < 0) | (target >= classes)) & (target != ignore_index)


_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def looks_at_targets(launcher: _Launcher) -> _Launcher:
    """Decorator: this launcher raises wrong_target_error itself, so that nobody need look at the targets before."""
    launcher.looks_at_targets = True  # type: ignore[attr-defined]
    return launcher


def require_targets_before(launcher: Callable[..., Any], target: Tensor, classes: int, ignore_index: int) -> None:
    """require_targets, unless the launcher looks at them."""
    if not getattr(launcher, "looks_at_targets", False):
        require_targets(target, classes, ignore_index)


def reduction_error(reduction: object) -> ValueError:
    return ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def target_error(target: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Exception:
    if target.dtype.is_floating_point:
        return TypeError(
            f"target must hold class indices, int64, got {checks.describe(target)}: class probabilities are not "
            "supported"
        )
    if target.dtype is not torch.int64:
        return TypeError(f"target must be int64, got {checks.describe(target)}")
    if target.device != rows.device:
        return ValueError(f"target must be on {rows.device}, got {checks.describe(target)}")
    return ValueError(f"target must be {shape}, a class for each row, got {checks.shape(target)}")


def _logits_error(logits: Tensor) -> Exception:
    if not logits.dtype.is_floating_point:
        return TypeError(f"logits must be floating point, got {checks.describe(logits)}")
    return ValueError(f"logits must be (rows, classes) with at least 1 class, got {checks.shape(logits)}")


def _x_error(x: Tensor) -> Exception:
    if not x.dtype.is_floating_point:
        return TypeError(f"x must be floating point, got {checks.describe(x)}")
    return ValueError(f"x must be (rows, features) with at least 1 feature, got {checks.shape(x)}")


def _parameter_error(name: str, tensor: Tensor, x: Tensor, spelled: str, sizes: str) -> Exception:
    if not tensor.dtype.is_floating_point:
        return TypeError(f"{name} must be floating point, got {checks.describe(tensor)}")
    if tensor.device != x.device:
        return ValueError(f"{name} must be on x's device {x.device}, got {checks.describe(tensor)}")
    return ValueError(f"{name} must be {spelled} = {sizes}, got {checks.shape(tensor)}")
