"""What every Triton kernel needs from its surroundings: whether it can run here, and a launch that costs little.

Names of Triton that differ between versions 3.6 to 3.9 are gathered here alone.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepass.core import env
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


# launch(...): the compiled kernel is found by what Triton itself specialises on, without Triton's 10 us of binding.
_Launch = Callable[..., None]


class Launcher:
    """A @triton.jit function whose launches cost 2 us of host time once it is compiled.

        _kernel = Launcher(_norm_fwd_kernel, ("BLOCK_ROWS", "BLOCK_COLS"))
        _kernel((programs, 1, 1), x.device, arguments, {"BLOCK_ROWS": 1, "BLOCK_COLS": 4096}, num_warps=8)

    `arguments` are those before the constexprs, in order: tensors (or None), ints and floats. Triton specialises a
    kernel on dtypes, on pointers divisible by 16, and on ints that are 1 or divisible by 16; so does the key here.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        if device.type != "cuda":  # the interpreter
            self.kernel[grid](*arguments, **constants, **options)
            return
        key = (device.index, tuple(map(_specialisation, arguments)), *constants.values(), *options.values())
        compiled = self._compiled.get(key)
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(compiled, key, grid, arguments, constants, options)
        else:
            self._launch(compiled, key, grid, arguments, constants, options)

    def _launch(
        self,
        compiled: Any,
        key: Any,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        constants: Any,
        options: Any,
    ) -> None:
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, **constants, **options)
        else:
            compiled[grid](*arguments, *constants.values())


def _specialisation(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)
