"""Checks that name the argument, what came, what was expected and what to do.

They run only when an operation's cheap comparison has failed, or for arguments that are rarely given: nothing here is
on the path of a plain, valid call.
"""

import difflib
import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def describe(tensor: Tensor) -> str:
    """ "float32 (2, 16, 4, 64) on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape(tensor)} on {tensor.device}"


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def require_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_tensors(**values: Any) -> None:
    """Each a tensor, or None where it was not given."""
    for name, value in values.items():
        if value is not None:
            require_tensor(name, value)


def require_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {str(tensor.layout).removeprefix('torch.')}"
        raise TypeError(f"{name} must be a dense, strided tensor, got {kind}: convert it with to_dense() or padding")


def require_bool(name: str, value: Any, or_none: str = "") -> None:
    """`or_none`: what None means, in words; empty when it is not allowed."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise TypeError(f"{name} must be True or False{or_none and ' ' + or_none}, got {value!r}")


def require_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise TypeError(f"{name} must be {names}, got {describe(tensor)}")


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {describe(tensor)}")


def require_shape(name: str, tensor: Tensor, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """`allowed` maps a shape as the documentation spells it, "(batch, seqlen_k)", to its sizes in this call."""
    sizes = tuple(tensor.shape)
    if all(sizes != expected for expected in allowed.values()):
        wanted = " or ".join(f"{spelled} = {expected}" for spelled, expected in allowed.items())
        raise ValueError(f"{name} must be {wanted}, got {shape(tensor)}")


def require_no_grad(name: str, tensor: Tensor, advice: str) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} has requires_grad=True, but it receives no gradient: {advice}")


def finite_float(name: str, value: Any) -> float:
    """`value` as a float; TypeError when it is no plain number, ValueError when NaN or infinite."""
    if isinstance(value, Tensor) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    result = float(value)
    if not -math.inf < result < math.inf:  # math.isfinite cannot be traced for floats that torch.compile makes symbolic
        raise ValueError(f"{name} must be finite, got {result}")
    return result


def options_of(function: Any) -> set[str]:
    """The names of a function's keyword-only arguments."""
    return set(function.__kwdefaults__)


def unknown_argument(function: Any, name: str, hints: Mapping[str, str]) -> TypeError:
    """The error for a keyword a function lacks: `hints` answer other libraries' spellings, else the nearest name."""
    advice = hints.get(name)
    if advice is None:
        known = list(function.__kwdefaults__)
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]}=?" if near else f"its options are {', '.join(known)}"
    return TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}: {advice}")


def arguments_of(function: Any, hints: Mapping[str, str], *args: Any, **options: Any) -> dict[str, Any]:
    """What the public `function` would be called with, its defaults filled in. TypeError for unknown arguments."""
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if unknown := given.pop("unknown"):
        raise unknown_argument(function, next(iter(unknown)), hints)
    return given
