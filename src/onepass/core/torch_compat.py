"""PyTorch's names that are private or moved between versions, gathered here alone."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
_is_grad_enabled = torch.is_grad_enabled


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def below_dispatcher(*tensors: Tensor | None) -> bool:
    """True when PyTorch's dispatcher has nothing to do for an operation on these tensors but to call its kernel.

    Then the kernel may be called directly, which saves 5 of the 7 us that a 16-argument operation costs. Anything that
    could want to see the call makes this False: autograd, tracing, compiling, modes, functorch, forward-mode tangents,
    profiling, subclasses, fake tensors, and tensors that the dispatcher would write out first (negated views, zero
    tensors). Give it every tensor of the call; `batched_gradient` tells what else a backward may meet.
    """
    return _plain(tensors, _is_grad_enabled())


def only_autograd(*tensors: Tensor | None) -> bool:
    """The same, but for autograd: what it wants of a call, the caller sees to."""
    return _plain(tensors, False)


def _plain(tensors: tuple[Tensor | None, ...], grad: bool) -> bool:
    if (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _is_tracing()
        or _profiler_enabled()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or (grad and tensor.requires_grad)
            or not (tensor.is_cpu or tensor.is_cuda)
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return True


def batched_gradient(gradient: Tensor) -> bool:
    """Whether autograd's own vmap (is_grads_batched=True) hides several gradients behind this one."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


# Tensors for C code: capsules with handles of PyTorch's stable C interface. Whoever gets a handle must delete it.
_interface: Any = getattr(torch._C, "_aoti", None)
tensor_handles: Any = getattr(_interface, "unsafe_alloc_void_ptrs_from_tensors", None)
# The function for one tensor copies the handle in spite of its name; the one for several takes it over.
take_tensors: Any = getattr(_interface, "alloc_tensors_by_stealing_from_void_ptrs", None)


def stable_c_interface() -> ctypes.CDLL | None:
    """The library with the functions aoti_torch_*; None where this PyTorch lacks them, or the two functions above."""
    if tensor_handles is None or take_tensors is None:
        return None
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


def register_autograd(
    library: torch.library.Library,
    op: Any,
    body: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """Registers the gradient of an operation: `save(ctx, inputs, outputs)`, then `differentiate(ctx, *gradients)`.

    What torch.library.register_autograd does, without its search for default values, which costs 60 us a call. Returns
    a function that records the gradient of a call and runs `body` without the dispatcher, for calls that are
    `only_autograd`: the dispatcher twice and its callbacks into Python cost 10 us.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            save(ctx, tuple(inputs), outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return (*differentiate(ctx, *gradients), None)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = body(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

    def autograd(keyset: Any, *args: Any) -> Any:
        refuse_transforms(op, args)
        if _is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Differentiable.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library.impl(op._schema.name.partition("::")[2], autograd, "Autograd", with_keyset=True)
    return Direct.apply


def refuse_transforms(op: Any, args: tuple[Any, ...]) -> None:
    """Raises under torch.func's transforms and for forward-mode tangents, which would be dropped silently."""
    if _functorch_level() is not None:
        raise NotImplementedError(f"torch.func transforms of {op} are not supported: use torch.autograd")
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"forward-mode differentiation of {op} is not supported: use torch.autograd")


def autocast_enabled(tensor: Tensor) -> bool:
    """True inside torch.autocast for this tensor's device."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(tensor.device.type)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, and in functions that it decorates, PyTorch's operations keep their inputs' dtypes."""
    with torch._C._DisableAutocast():
        yield


def fills_memory() -> bool:
    """Whether torch.empty is filled with NaN under deterministic algorithms."""
    return torch._C._get_deterministic_fill_uninitialized_memory()


def fill_memory(fill: bool) -> None:
    torch._C._set_deterministic_fill_uninitialized_memory(fill)
