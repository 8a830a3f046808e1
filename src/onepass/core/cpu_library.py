"""The C++ library: found, loaded once, bound to an instruction set, called through ctypes.

The library is not linked to an OpenMP runtime. It takes the `libgomp` that PyTorch brought along, so that both run
their parallel regions on one pool of threads; two pools would compete for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from . import env, launches, torch_compat

_LIBRARY_NAME = "libonepass_cpu.so"
_BAD_INDEX = 2  # csrc/abi.h
# csrc/abi.h. Dtypes that caches may have beside the keys' own, whose code is CACHE_PLAIN; uint8 holds int4.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_PLAIN = 0
CACHE_CODES = {
    torch.int8: 1,
    torch.float8_e4m3fn: 2,
    torch.float8_e5m2: 3,
    torch.float8_e4m3fnuz: 4,
    torch.float8_e5m2fnuz: 5,
    torch.uint8: 6,
}


class CpuLibraryError(RuntimeError):
    """The C++ library cannot be used here; the message says why and what to do."""


def _find_library() -> Path:
    forced = env.cpu_library()
    if forced is not None:
        if not Path(forced).is_file():
            raise CpuLibraryError(f"ONEPASS_CPU_LIBRARY={forced!r} is not a file")
        return Path(forced)
    path = Path(__file__).parent.parent / "_lib" / _LIBRARY_NAME
    if not path.is_file():
        raise CpuLibraryError(
            f"the C++ kernels are missing ({path}): install the package with `pip install .`, or build them with "
            f"`cmake -S . -B build && cmake --build build` and set ONEPASS_CPU_LIBRARY=build/{_LIBRARY_NAME}"
        )
    return path


def _load_openmp() -> None:
    """Makes the symbols of PyTorch's own libgomp global; a system's libgomp serves where PyTorch brings none."""
    root = Path(torch.__file__).parent
    folders = (root / "lib", root.parent / "torch.libs")
    candidates = [path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    errors = []
    for candidate in [*map(str, candidates), "libgomp.so.1"]:
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            errors.append(f"{candidate}: {error}")
    raise CpuLibraryError(
        "no OpenMP runtime was found (Debian and Ubuntu: apt install libgomp1):\n" + "\n".join(errors)
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises CpuLibraryError, which says why and what to do, when it cannot be used here."""
    path = _find_library()
    _load_openmp()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise CpuLibraryError(f"{path} cannot be loaded: {error}") from error
    loaded.onepass_isa.restype = ctypes.c_char_p
    loaded.onepass_compiled_isa.restype = ctypes.c_char_p
    if not loaded.onepass_isa():
        raise CpuLibraryError("this x86-64 processor lacks SSE4.2 (x86-64-v2), the least that onepass is built for")
    wanted = env.cpu_isa()
    if wanted is not None and not loaded.onepass_set_isa(wanted.encode()):
        raise CpuLibraryError(f"ONEPASS_CPU_ISA={wanted!r}: this machine runs {', '.join(_isas(loaded))}")
    return loaded


def _isas(loaded: ctypes.CDLL) -> list[str]:
    compiled: list[str] = []
    while (name := loaded.onepass_compiled_isa(len(compiled))) is not None:
        compiled.append(name.decode())
    return [name for name in compiled if loaded.onepass_isa_supported(name.encode())]


@functools.cache
def unavailable() -> str | None:
    """Why the C++ kernels cannot run here; None when they can."""
    try:
        library()
    except CpuLibraryError as error:
        return str(error)
    return None


def isa() -> str:
    """The instruction set whose kernels run, such as "avx512_bf16"."""
    return library().onepass_isa().decode()


def isas() -> list[str]:
    """The instruction sets that are compiled in and that this machine has, worst first."""
    return _isas(library())


@functools.cache
def kernel(name: str) -> Callable[[bytes], None]:
    """The kernel `name` of csrc/kernels.def, called with its packed argument struct (csrc/abi.h).

    Raises MemoryError when the kernel could not allocate its workspace, IndexError when an index in a tensor points
    outside its array (the caller says which), and CpuLibraryError when there is no library.
    """
    function = getattr(library(), f"onepass_{name}")
    function.argtypes = (ctypes.c_char_p,)
    address = ctypes.cast(function, ctypes.c_void_p).value or 0

    def call(arguments: bytes) -> None:
        status = function(arguments)
        if launches.watched:
            launches.tell(_launch(address, arguments))
        if status:
            if status == _BAD_INDEX:
                raise IndexError(f"onepass: an index given to the C++ kernel {name} is out of range")
            raise MemoryError(f"onepass: the C++ kernel {name} could not allocate its workspace")

    return call


def _launch(address: int, arguments: bytes) -> launches.Launch | None:
    """A call of a kernel as those who watch want it: all fields of the argument structs have 8 bytes."""
    count, rest = divmod(len(arguments), 8)
    return None if rest else launches.Launch(address, struct.unpack(f"={count}q", arguments), None)


# The fields of struct HostFunctions (csrc/torch_tensors.h): PyTorch's, then Python's.
_TORCH_FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_get_layout",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
)
_PYTHON_FUNCTIONS = (
    "PyCapsule_GetPointer",
    "PyCapsule_New",
    "Py_IncRef",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)


@functools.cache
def host_functions() -> list[int] | None:
    """The addresses in struct HostFunctions; None where this PyTorch lacks one, or there is no library."""
    torch_library = torch_compat.stable_c_interface()
    if torch_library is None or unavailable() is not None:
        return None
    try:
        functions = [getattr(torch_library, name) for name in _TORCH_FUNCTIONS]
    except AttributeError:
        return None
    functions += [getattr(ctypes.pythonapi, name) for name in _PYTHON_FUNCTIONS]
    (taken,) = torch_compat.take_tensors(torch_compat.tensor_handles([torch.empty(1)]))
    if taken._use_count() != 1:  # else every output would leak
        return None
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
