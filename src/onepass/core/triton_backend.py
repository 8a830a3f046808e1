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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; a few where Triton is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """The most bytes of shared memory that a program on a GPU may have."""
    import triton

    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def interpreted(device: torch.device) -> bool:
    """Whether kernels on this device run in the interpreter, one program after the other."""
    return device.type == "cpu" and env.triton_interpreted()


def most_warps(device: torch.device) -> int:
    """Of a block of 1024 threads, the most that any target takes."""
    return 16 if torch.version.hip is not None and device.type == "cuda" else 32


# What a launch of a new kind needs: the arguments before the constexprs, with tensors, the constexprs, num_warps.
Description = tuple[Sequence[Any], dict[str, Any], int]


class Launcher:
    """A @triton.jit function whose launches cost 3 us of host time once it is compiled, where Triton's own cost 20.

        _kernel = Launcher(_norm_fwd_kernel)
        _kernel(key, (programs, 1, 1), x.device, numbers, describe)

    `numbers` are the arguments before the constexprs with pointers as ints (x.data_ptr(), 0 for None). `describe()`
    gives the same with tensors, and the rest, when a kind of launch is new. `key` must tell kinds apart: all that
    Triton specialises on (dtypes, constexprs, num_warps, pointers and ints divisible by 16, ints that are 1 or of more
    than 32 bits).
    """

    def __init__(self, kernel: Any, most_registers: int | None = None, targets: str = "") -> None:
        """`most_registers` of a thread, on NVIDIA GPUs: fewer let more programs run at once. `targets`: "cuda" or "hip"
        for a kernel (of Gluon) that is launched there alone.
        """
        self.kernel = kernel
        self.targets = targets
        self.nvidia_options = {} if most_registers is None else {"maxnreg": most_registers}
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        key: Any,
        grid: tuple[int, int, int],
        device: torch.device,
        numbers: Sequence[int | float],
        describe: Callable[[], Description],
    ) -> None:
        index = device.index
        known = self._compiled.get((index, key))
        if known is not None and _current_device() == index:
            run, function, metadata, constants, compiled = known
            run(*grid, _current_stream(index), function, metadata, None, None, None, *numbers, *constants)
            if launches.watched:
                launches.tell(_written_down(compiled, grid, numbers))
        elif device.type != "cuda" or _current_device() == index:
            self._launch(known, (index, key), grid, device, describe)
        else:
            with torch.cuda.device(device):
                self._launch(known, (index, key), grid, device, describe)

    def launch(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        *,
        num_warps: int,
    ) -> None:
        """The same without a key of the caller's: it is made of all the arguments, which costs 10 us."""
        kinds: list[Any] = []
        numbers: list[int | float] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                numbers.append(argument.data_ptr())
                kinds.append((argument.dtype, argument.data_ptr() & 15 == 0))
            elif isinstance(argument, int):
                numbers.append(argument)
                kinds.append(specialised(argument))
            else:
                numbers.append(0 if argument is None else argument)
                kinds.append(type(argument))
        key = (*kinds, *constants.values(), num_warps)
        self(key, grid, device, numbers, lambda: (arguments, constants, num_warps))

    def _launch(
        self,
        known: Any,
        key: Any,
        grid: tuple[int, int, int],
        device: torch.device,
        describe: Callable[[], Description],
    ) -> None:
        arguments, constants, num_warps = describe()
        more = self.nvidia_options if device.type == "cuda" and torch.version.hip is None else {}
        compiled = self.kernel[grid](*arguments, **constants, num_warps=num_warps, **more)
        if known is None and device.type == "cuda":
            values = tuple(constants.values())
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, values, compiled
        if launches.watched:
            launches.tell(None)


def _written_down(compiled: Any, grid: tuple[int, int, int], numbers: Sequence[int | float]) -> launches.Launch | None:
    """A launch as those who watch want it; None where more than cuLaunchKernel would be needed."""
    facts = compiled.metadata
    usual = {
        "num_ctas": 1,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
    }
    if facts.target.backend != "cuda" or any(getattr(facts, name, None) != value for name, value in usual.items()):
        return None
    words: list[int] = []
    pointers: list[bool] = []
    for number, kind in zip(numbers, compiled.src.signature.values(), strict=False):
        if kind == "constexpr":  # a 1
            continue
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
    )


def aligned(*pointers: int) -> bool:
    """Whether all are divisible by 16, as loads of 16 bytes need it."""
    together = 0
    for pointer in pointers:
        together |= pointer
    return together & 15 == 0


def specialised(*numbers: int) -> tuple[int, ...]:
    """What of these ints a kernel is compiled for, to go into a key: 1, divisible by 16, more than 32 bits."""
    return tuple([(n == 1) | (n % 16 == 0) << 1 | (n >= 2**31) << 2 for n in numbers])


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_current_device: Callable[[], int] = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else lambda: -1
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
