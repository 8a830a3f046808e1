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


# The same for csrc/replay.cpp: functions that give None, False or 0 while PyTorch has nothing to add to a plain call.
QUIET_WHEN_PLAIN = (
    _dispatch_modes,
    _function_modes,
    _is_tracing,
    _profiler_enabled,
    _functorch_level,
)
FORWARD_LEVEL = (forward_ad, "_current_level")  # -1 while there are no forward-mode tangents
# The current device, and the current stream of a device.
CUDA_STATE = (getattr(torch._C, "_cuda_getDevice", None), getattr(torch._C, "_cuda_getCurrentRawStream", None))
ALLOWS_TF32 = torch._C._get_cublas_allow_tf32  # torch.backends.cuda.matmul.allow_tf32, without its property
DTYPE_NUMBERS = {  # c10::ScalarType
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}


def batched_gradient(gradient: Tensor) -> bool:
    """Whether autograd's own vmap (is_grads_batched=True) hides several gradients behind this one."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def saved_tensors_hooked() -> bool:
    """Whether hooks (torch.autograd.graph.saved_tensors_hooks) see what is saved; True where PyTorch does not tell."""
    tells = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return True if tells is None else tells(True) is not None


def graph_is_kept() -> bool:
    """Whether the backward that runs now may run again (retain_graph=True); True where PyTorch does not tell."""
    tells = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tells is None else tells()


# Tensors for C code: capsules with handles of PyTorch's stable C interface. Whoever gets a handle must delete it.
_interface: Any = getattr(torch._C, "_aoti", None)
tensor_handles: Any = getattr(_interface, "unsafe_alloc_void_ptrs_from_tensors", None)
# The function for one tensor copies the handle in spite of its name; the one for several takes it over.
take_tensors: Any = getattr(_interface, "alloc_tensors_by_stealing_from_void_ptrs", None)


def handle_offset(address_of_handle: Callable[[Any], int]) -> int:
    """Where a tensor's object holds what its handles point to, if that is the same for all; 0: unknown.

    `address_of_handle` gives the address of a capsule's handle. The layout is PyTorch's own affair and has changed, so
    it is looked for: the word that is the same in the object and behind the handle.
    """
    head = object.__basicsize__
    tensors = [
        torch.empty(1),
        torch.empty(2, requires_grad=True),
        torch.nn.Parameter(torch.empty(3)),
        torch.empty(4)[1:],
    ]

    def holds(tensor: Tensor, offset: int) -> bool:
        handle = address_of_handle(tensor_handles([tensor])[0])
        word = ctypes.c_uint64.from_address
        return word(id(tensor) + offset).value == word(handle).value

    found = [offset for offset in (head, head + 8) if all(holds(tensor, offset) for tensor in tensors)]
    return found[0] if len(found) == 1 else 0


def wrap_function() -> int:
    """The address of the function that makes a tensor's object, given its handle; 0: unknown."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
        function = library._Z16THPVariable_WrapRKN2at10TensorBaseE
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


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
    plain: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """Registers the gradient of an operation: `save(ctx, inputs, outputs)`, then `differentiate(ctx, *gradients)`.

    What torch.library.register_autograd does, without its search for default values, which costs 60 us a call. Returns
    a function that records the gradient of a call and does it by `plain`, without the dispatcher, for calls that are
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
            outputs = plain(*inputs)
            ctx.outputs_are_ours = True  # a public function's own: it gives away what it documents
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

    name = op._schema.name.partition("::")[2]
    library.impl(name, autograd, "Autograd", with_keyset=True)
    named: Any = type(f"onepass_{name}_", (Direct,), {})  # the name that grad_fn and PyTorch's errors show
    return super(torch.autograd.Function, named).apply  # without its questions about functorch: 2 us


def register_mutation(library: torch.library.Library, op: Any, refusal: str) -> None:
    """For an operation that writes into its arguments: PyTorch counts the writes, and a gradient raises `refusal`."""
    written = [place for place, argument in enumerate(op._schema.arguments) if _is_written(argument)]

    def autograd(keyset: Any, *args: Any) -> Any:
        refuse_transforms(op, args)
        if _is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(refusal)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def counted(keyset: Any, *args: Any) -> Any:
        for place in written:
            if args[place] is not None:
                torch.autograd.graph.increment_version(args[place])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    name = op._schema.name.partition("::")[2]
    library.impl(name, autograd, "Autograd", with_keyset=True)
    library.impl(name, counted, "ADInplaceOrView", with_keyset=True)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


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


_X86 = getattr(torch.cpu, "_is_avx2_supported", lambda: False)()
_FAST_HALVES = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
_SLOW_HALVES = {
    dtype: _X86 and not any(getattr(torch.cpu, name, lambda: True)() for name in names)
    for dtype, names in _FAST_HALVES.items()
}


def multiplies_slowly(x: Tensor) -> bool:
    """Whether torch.mm in x's dtype takes longer than in fp32: x86 without instructions for it (bf16: 4 times)."""
    return x.is_cpu and _SLOW_HALVES.get(x.dtype, False)


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
