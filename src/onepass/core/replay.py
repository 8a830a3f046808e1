"""Plain calls done again in C: what an operation allocated and launched for a call is watched once, then repeated.

    softmax = PlainCalls(kernels.FORWARD, launch, torch.ops.onepass.softmax_fwd)
    y = softmax(x, backend)

The second call that looks like an earlier one (same dtypes, sizes, strides, alignment, options) runs while its
allocations, launches and calls of the C++ library are written down; from the third on csrc/replay.cpp does it all in
5 us where Python takes 15 to 40. A call whose work is not made of these alone, such as one that first copies an input,
is never replayed. Neither is one that anything but the kernel could want to see: autograd, autocast, modes, tracing, a
subclass, a device that is not current.

Everything here is about time: without it the ordinary way gives the same results.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import TorchDispatchMode

from onepass.core import cpu_library, torch_compat
from onepass.core.launches import Launch, watching
from onepass.core.registry import KernelTable

_CPU, _CUDA = 0, 1  # PyTorch's numbers of devices
_IN_PYTHON = (
    "PyObject_CallNoArgs",
    "PyObject_CallOneArg",
    "PyObject_GetAttr",
    "PyList_New",
    "PyList_SetItem",
    "PyList_GetItem",
    "PyTuple_New",
    "PyTuple_SetItem",
    "PyLong_AsLongLong",
    "PyLong_FromLongLong",
    "PyFloat_AsDouble",
    "PyUnicode_AsUTF8AndSize",
    "PyErr_Occurred",
    "PyErr_Clear",
    "Py_DecRef",
)
_MOST_QUIET = 8
_METH_FASTCALL = 0x80


class _MethodDef(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_library: ctypes.PyDLL | None = None  # PyDLL: its functions hold the GIL, which guards the tables of plans
_first_call = threading.Lock()
_kept: list[Any] = []  # what C has borrowed
_paused = 0


def _bind() -> ctypes.PyDLL | None:
    """The library with everything handed over that csrc/replay.cpp needs; None where something is missing."""
    if not hasattr(sys, "getrefcount") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    torch_functions = cpu_library.host_functions()
    if torch_functions is None:
        return None
    python = [_address(getattr(ctypes.pythonapi, name)) for name in _IN_PYTHON]
    plain = torch_compat.QUIET_WHEN_PLAIN
    assert len(plain) <= _MOST_QUIET
    objects: list[Any] = [None, True, False, 0, -1, Tensor, torch.nn.Parameter, int, float, str]
    after: list[Any] = [
        *torch_compat.FORWARD_LEVEL,
        torch.is_grad_enabled,
        "requires_grad",
        Tensor.is_neg,
        torch.get_num_threads,
        *torch_compat.CUDA_STATE,
        torch_compat.ALLOWS_TF32,
        torch_compat.tensor_handles,
        torch_compat.take_tensors,
    ]
    _kept.extend((objects, plain, after))
    words = [
        *torch_functions,
        *python,
        _launch_cuda(),
        *map(id, objects),
        *map(id, plain),
        *[0] * (_MOST_QUIET - len(plain)),
        *map(id, after),
        torch_compat.handle_offset(_handle),
        torch_compat.wrap_function(),
    ]
    library = ctypes.PyDLL(cpu_library.library()._name)
    library.onepass_replay_bind.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    library.onepass_replay_bind.restype = ctypes.c_int64
    packed = struct.pack(f"={len(words)}Q", *words)
    if wanted := library.onepass_replay_bind(packed, len(packed)):
        raise cpu_library.CpuLibraryError(f"the C++ library is of another version: {wanted} bytes, not {len(packed)}")
    library.onepass_replay_new.restype = ctypes.c_void_p
    library.onepass_replay_forget.argtypes = (ctypes.c_void_p,)
    library.onepass_replay_add.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)
    return library


def _handle(capsule: Any) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_void_p), ctypes.c_void_p
    return pointer(capsule, None) or 0


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _launch_cuda() -> int:
    """cuLaunchKernelEx; 0 where there is no NVIDIA GPU, and nothing that would call it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    return _address(ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx)


@contextmanager
def paused() -> Iterator[None]:
    """Inside, every call goes the ordinary way (for tests that replace a launcher)."""
    global _paused  # noqa: PLW0603
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def _declines(*call: Any) -> None:
    return None


class PlainCalls:
    """What api.py calls: replayed where that is possible, else `plain(*call)` where PyTorch's dispatcher has nothing to
    add, else `dispatched(*call)`.

    The call is made of tensors, numbers, strings and None; all of its tensors count. The result is a tensor or a tuple
    of tensors.
    """

    def __init__(self, table: KernelTable, plain: Callable[..., Any], dispatched: Callable[..., Any]) -> None:
        self._plain, self._dispatched = plain, dispatched
        self._replay: Callable[..., Any] = self._first
        self._calls: int | None = None
        table.when_forgotten.append(self.forget)

    def __call__(self, *call: Any) -> Any:
        if not is_dynamo_compiling():  # what else compiles has a mode, which C sees
            found = None if _paused else self._replay(*call)
            if found is not None:
                return self._watched(found, call) if type(found) is int else found
            if torch_compat.below_dispatcher(*[x for x in call if isinstance(x, Tensor)]):
                return self._plain(*call)
        return self._dispatched(*call)

    def forget(self) -> None:
        """Drops all plans."""
        if self._calls is not None and _library is not None:
            _library.onepass_replay_forget(self._calls)

    def _first(self, *call: Any) -> Any:
        """The first call makes the C function."""
        with _first_call:
            if self._calls is None:
                self._make()
        return self._replay(*call)

    def _make(self) -> None:
        global _library  # noqa: PLW0603
        _library = _library or _bind()
        if _library is None:
            self._replay = _declines
            return
        self._calls = _library.onepass_replay_new()
        pointer, made = ctypes.c_void_p, ctypes.py_object
        new_capsule, new_function = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCFunction_NewEx
        new_capsule.argtypes, new_capsule.restype = (pointer, pointer, pointer), made
        new_function.argtypes, new_function.restype = (pointer, made, pointer), made
        definition = _MethodDef(b"replay", _address(_library.onepass_replay_call), _METH_FASTCALL, None)
        _kept.append(definition)
        self._replay = new_function(ctypes.addressof(definition), new_capsule(self._calls, None, None), None)

    def _watched(self, serial: int, call: tuple[Any, ...]) -> Any:
        inputs = [x for x in call if isinstance(x, Tensor)]
        with _Watch() as watch, watching() as launches:
            result = self._plain(*call)  # C has found nothing that the dispatcher would do
        plan = _plan(inputs, watch, launches, result)
        assert _library is not None
        _library.onepass_replay_add(self._calls, serial, plan, len(plan) // 8)
        return result


class _Watch(TorchDispatchMode):
    """What PyTorch is asked for: allocations, and whether anything else was computed."""

    ALLOCATIONS = frozenset(("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"))
    FREE = frozenset(  # views, and a question about dtypes
        f"aten::{name}"
        for name in ("view", "_unsafe_view", "alias", "detach", "expand", "as_strided", "unsqueeze", "promote_types")
    )

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False keeps PyTorch from wrapping this class, for which it would import all of torch._dynamo: 1.2 s."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.only_allocates = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in self.ALLOCATIONS:
            self.made.append(result)  # kept, so that no two have one address
        elif name not in self.FREE:
            self.only_allocates = False
        return result


def _plan(inputs: Sequence[Tensor], watch: _Watch, seen: Sequence[Launch | None], result: Any) -> bytes:
    """The plan as csrc/replay.cpp reads it; empty when the call cannot be replayed."""
    launches = [launch for launch in seen if launch is not None]
    if not watch.only_allocates or len(launches) != len(seen):
        return b""
    results = (result,) if isinstance(result, Tensor) else result
    if not all(isinstance(x, Tensor) for x in results):
        return b""
    made = [x for x in watch.made if x.numel()]
    indices = {x.data_ptr(): i for i, x in enumerate(made)}
    empty = [x for x in results if not x.numel()]  # they have no addresses to tell them by, and nobody writes to them
    device = inputs[0].device
    if any(x.device != device for x in (*made, *empty)):
        return b""
    tensors = [*inputs, *made]
    places = {x.data_ptr(): i for i, x in enumerate(tensors) if x.numel()}  # inputs that share memory do so in replays
    if not all(_is_one_of(x, made, indices) for x in results if x.numel()):
        return b""
    next_empty = itertools.count(len(made))
    words: list[int] = [_CPU if device.type == "cpu" else _CUDA, isinstance(result, Tensor)]
    words += _vector([indices[x.data_ptr()] if x.numel() else next(next_empty) for x in results])
    made += empty
    words.append(len(made))
    numbers = torch_compat.DTYPE_NUMBERS
    for x, as_returned in ((x, _returned_as(x, results)) for x in made):
        words += [numbers[x.dtype], *_vector(as_returned.shape), *_vector(as_returned.stride())]
    words.append(len(launches))
    for launch in launches:
        patched: list[int] = []
        for place in launch.pointers(places):
            if launch.words[place] not in places:
                return b""
            patched += [place, places[launch.words[place]]]
        on_cpu = device.type == "cpu"
        words += [launch.function, on_cpu, *launch.grid, launch.threads, launch.shared, launch.follows]
        words += [*_vector(launch.words), *_vector(patched)]
    return struct.pack(f"={len(words)}q", *words)


def _is_one_of(x: Tensor, made: Sequence[Tensor], indices: dict[int, int]) -> bool:
    """Whether x is a whole allocation, perhaps with another shape."""
    index = indices.get(x.data_ptr())
    return index is not None and x.numel() == made[index].numel() and x.is_contiguous()


def _returned_as(x: Tensor, results: Sequence[Tensor]) -> Tensor:
    """The result that has this allocation's memory; else the allocation itself."""
    if not x.numel():
        return x
    return next((result for result in results if result.data_ptr() == x.data_ptr()), x)


def _vector(values: Any) -> Iterator[int]:
    listed = list(values)
    return itertools.chain((len(listed),), listed)
