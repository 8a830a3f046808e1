"""PyTorch's names that are private or moved between versions, gathered here alone."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The names are those of PyTorch 2.9 to 2.13.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
_profiler_enabled = torch._C._autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling


def below_dispatcher(q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None) -> bool:
    """True when PyTorch's dispatcher has nothing to do for an operation on these CPU tensors but to call its kernel.

    Then the kernel may be called directly, which saves 5 of the 7 us that a 16-argument operation costs. Anything that
    could want to see the call makes this False: autograd, tracing, compiling, modes, functorch, forward-mode tangents,
    profiling, subclasses, fake tensors, and negated views, which the dispatcher would write out first.
    """
    if (
        _is_compiling()
        or type(q) is not Tensor
        or type(k) is not Tensor
        or type(v) is not Tensor
        or not q.is_cpu
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or _is_tracing()
    ):
        return False
    tracked = torch.is_grad_enabled()
    if tracked and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    for tensor in optional:
        if tensor is not None and (type(tensor) is not Tensor or tensor.is_neg() or (tracked and tensor.requires_grad)):
            return False
    return True


def refuse_forward_ad(op: str, tensors: tuple[Any, ...]) -> None:
    """Raises when a tensor carries a forward-mode tangent, which an operation without a jvp would drop silently."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"forward-mode differentiation of onepass.{op} is not supported: use backward()")


def autocast_enabled(tensor: Tensor) -> bool:
    """True inside torch.autocast for this tensor's device."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(tensor.device.type)
