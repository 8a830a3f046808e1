"""What every Triton kernel needs from its surroundings: whether it can run here, and a launch that costs little.

Names of Triton that differ between versions 3.6 to 3.9 are gathered here alone.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepass.core import env, launches
from onepass.core.registry import Kernel

_MIN_VERSION = (3, 6)


@functools.cache
def unavailable() -> str | None:
    """Why Triton's kernels cannot run on this machine; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _MIN_VERSION:
        return f"Triton {triton.__version__} is older than 3.6"
    if not torch.cuda.is_available() and not env.triton_interpreted():
        return "there is no GPU here (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def row(unsupported: Callable[[Any], list[str]], launcher: str) -> Kernel:
    """A Triton kernel's row in a table. Its priority matters only in the interpreter, where `cpu` goes before it."""
    return Kernel("triton", 5, unsupported, launcher, unavailable=unavailable, shown_on="sm_90")


def unsupported_arch(arch: str) -> list[str]:
    """Reasons against an architecture, as core.device.arch names it."""
    if arch.startswith("gfx"):
        return []
    if arch.startswith("sm_"):
        return [] if int(arch[3:]) >= 80 else [f"{arch} is older than sm_80"]
    if arch == "cpu":
        return [] if env.triton_interpreted() else ["tensors are on cpu"]
    return [f"tensors are on {arch}"]


def unsupported_storage(arch: str, dtype: torch.dtype) -> list[str]:
    """Reasons against caches of a dtype: the formats of fp8 that Triton cannot load or store on an architecture."""
    if not dtype.is_floating_point or dtype.itemsize > 1:
        return []
    name = f"caches of {str(dtype).removeprefix('torch.')}"
    if dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        return [] if arch == "gfx942" else [f"{name}: gfx942 only"]
    if arch == "gfx942":
        return [f"{name}: not on gfx942, which has the fnuz formats"]
    if dtype is torch.float8_e4m3fn and arch.startswith("sm_") and int(arch[3:]) < 89:
        return [f"{name}: sm_89 and newer only"]
    return []


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; a few where Triton is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# Bytes of shared memory that a program may have, where that is not the least of its kind.
_SHARED_MEMORY = {"sm_80": 166912, "sm_87": 166912, "gfx950": 163840}


def shared_memory(arch: str) -> int:
    """The most bytes of shared memory that a program on an architecture may have."""
    if arch in _SHARED_MEMORY:
        return _SHARED_MEMORY[arch]
    if arch.startswith("sm_"):
        return 232448 if 90 <= int(arch[3:]) < 120 else 101376
    return 65536


def is_hopper_or_newer(arch: str) -> bool:
    """NVIDIA's architectures with a tensor memory accelerator, bulk prefetches (triton_functions.prefetch), and kernels
    that begin while the one before them ends (programmatic dependent launch).
    """
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def interpreted(device: torch.device) -> bool:
    """Whether kernels on this device run in the interpreter, one program after the other."""
    return device.type == "cpu" and env.triton_interpreted()


def most_warps(device: torch.device) -> int:
    """Of a block of 1024 threads, the most that any target takes."""
    return 16 if torch.version.hip is not None and device.type == "cuda" else 32


class Launcher:
    """A @triton.jit function that is launched through a table of what has been compiled: 10 us of host time, where
    Triton's own way costs 20. (core/replay.py does a call that has been seen before in 5 us, launches and all.)

        _kernel = Launcher(_norm_fwd_kernel)
        _kernel.launch((programs, 1, 1), x.device, (x, y, rows), {"BLOCK_COLS": 1024}, num_warps=4)
    """

    def __init__(self, kernel: Any, most_registers: int | None = None, targets: str = "") -> None:
        """`most_registers` of a thread, on NVIDIA GPUs: fewer let more programs run at once. `targets`: "cuda" or "hip"
        for a kernel (of Gluon) that is launched there alone.
        """
        self.kernel = kernel
        self.targets = targets
        self.nvidia_options = {} if most_registers is None else {"maxnreg": most_registers}
        self._compiled: dict[Any, Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        *,
        num_warps: int,
        follows: bool = False,
    ) -> None:
        """`arguments` are those before the constexprs, `constants` the constexprs, both in the kernel's order.

        `follows`, on Hopper and newer: the kernel may begin before the one launched last has ended, and waits for it
        itself (triton_functions.wait_for_previous) before it touches memory.
        """
        kinds: list[Any] = []  # all that Triton compiles a kernel anew for
        numbers: list[int | float] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                numbers.append(argument.data_ptr())
                kinds.append((argument.dtype, argument.data_ptr() & 15 == 0))
            elif isinstance(argument, int):
                numbers.append(argument)
                kinds.append((argument == 1) | (argument % 16 == 0) << 1 | (argument >= 2**31) << 2)
            elif hasattr(argument, "block_shape"):  # a TensorDescriptor, for TMA
                numbers.append(argument)
                kinds.append((argument.base.dtype, *argument.block_shape))
            else:
                numbers.append(0 if argument is None else argument)
                kinds.append(type(argument))
        values = constants.values()
        key = (device.index, *kinds, *values, num_warps, follows)
        compiled = self._compiled.get(key)
        if compiled is not None and _current_device() == device.index:
            run, function, metadata, whole = compiled
            run(*grid, _current_stream(device.index), function, metadata, None, None, None, *numbers, *values)
            if launches.watched:
                launches.tell(_written_down(whole, grid, numbers))
        elif device.type != "cuda" or _current_device() == device.index:
            self._by_triton(key, grid, device, arguments, constants, num_warps, follows)
        else:
            with torch.cuda.device(device):
                self._by_triton(key, grid, device, arguments, constants, num_warps, follows)

    def _by_triton(
        self,
        key: Any,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        num_warps: int,
        follows: bool,
    ) -> None:
        on_nvidia = device.type == "cuda" and torch.version.hip is None
        more = {**self.nvidia_options, "launch_pdl": follows} if on_nvidia else {}
        whole = self.kernel[grid](*arguments, **constants, num_warps=num_warps, **more)
        if device.type == "cuda":
            self._compiled[key] = whole.run, whole.function, whole.packed_metadata, whole
        if launches.watched:
            launches.tell(None)


def _written_down(compiled: Any, grid: tuple[int, int, int], numbers: Sequence[int | float]) -> launches.Launch | None:
    """A launch as those who watch want it; None where csrc/replay.cpp could not make it."""
    facts = compiled.metadata
    usual = {
        "num_ctas": 1,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
    }
    if facts.target.backend != "cuda" or any(getattr(facts, name, None) != value for name, value in usual.items()):
        return None
    words: list[int] = []
    pointers: list[bool] = []
    for number, kind in zip(numbers, compiled.src.signature.values(), strict=False):
        if kind == "constexpr":  # a 1
            continue
        if kind.startswith("tensordesc"):  # it holds an address
            return None
        if kind == "fp32":
            words.append(struct.unpack("=I", struct.pack("=f", number))[0])
        elif kind.startswith("*") or kind in ("i32", "i64"):
            words.append(int(number))
        else:
            return None
        pointers.append(kind.startswith("*"))
    scratch = (0, 0)  # Triton's own two last arguments
    return launches.Launch(
        compiled.function,
        (*words, *scratch),
        (*pointers, False, False),
        grid,
        32 * facts.num_warps,
        facts.shared,
        getattr(facts, "launch_pdl", False),
    )


def aligned(*pointers: int) -> bool:
    """Whether all are divisible by 16, as loads of 16 bytes need it."""
    return all(pointer & 15 == 0 for pointer in pointers)


_current_device: Callable[[], int] = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else lambda: -1
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
