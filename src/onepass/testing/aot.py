"""Triton kernels compiled ahead of time for architectures that this machine need not have.

    launches = aot.recorded(lambda: fwd.forward(x))          # nothing runs: only what would have been launched
    aot.assert_every_kernel_compiles("onepass.ops.softmax.triton", launches)
    text = aot.compiled(launches[0], "sm_90")                # PTX or AMD assembly

The launches are those that the operation's own host code makes, with its configurations, strides and constants. Triton
must not be interpreted: where TRITON_INTERPRET=1 there is nothing to compile, and `recorded` raises.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core import env
from onepass.core.triton_backend import Launcher

# (backend, architecture, threads in a warp) as Triton names them.
TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_MOST_THREADS = 1024  # of a block, on every target


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what `Launcher.launch` was called with."""

    kernel: Any
    arguments: Sequence[Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    nvidia_options: Mapping[str, Any]
    targets: str

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def __str__(self) -> str:
        return f"{self.name} {dict(self.constants)} {dict(self.options)}"


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call()` makes, each different one once; none of them runs. Outputs are uninitialised."""
    if env.triton_interpreted():
        raise RuntimeError("with TRITON_INTERPRET=1 kernels are Python functions and cannot be compiled")
    launches: dict[str, Launch] = {}
    with _recording(lambda launch: launches.setdefault(str((_signature(launch), str(launch))), launch)):
        call()
    return list(launches.values())


@contextmanager
def _recording(add: Callable[[Launch], Any]) -> Iterator[None]:
    def record(
        self: Launcher,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        *,
        num_warps: int,
    ) -> None:
        options = {"num_warps": num_warps}
        add(Launch(self.kernel, tuple(arguments), dict(constants), options, self.nvidia_options, self.targets))

    ordinary = Launcher.launch
    Launcher.launch = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launcher.launch = ordinary  # type: ignore[method-assign]


def compiled(launch: Launch, target: str) -> str:
    """The assembly of one launch for one of TARGETS. Raises what Triton raises when it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    backend, arch, warp = TARGETS[target]
    signature, constants, attributes = _signature(launch)
    options = {**launch.options, **(launch.nvidia_options if backend == "cuda" else {})}
    options["num_warps"] = min(options.get("num_warps", 4), _MOST_THREADS // warp)
    gpu = GPUTarget(backend, arch, warp)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), _active(gpu):
        triton.knobs.cache.dir = folder  # a hit in the user's cache would compile nothing
        make = GluonASTSource if launch.kernel.is_gluon() else ASTSource
        source = make(launch.kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=gpu, options=options)
        return str(kernel.asm["ptx" if backend == "cuda" else "amdgcn"])


@contextmanager
def _active(target: Any) -> Iterator[None]:
    """Inside, device functions that ask for the GPU there is (target_info.is_cuda) find this one."""
    from triton.runtime import driver

    class Stub:
        def get_current_target(self) -> Any:
            return target

    before = driver._active
    driver.set_active(Stub())
    try:
        yield
    finally:
        driver._active = before


def assert_every_kernel_compiles(package: str, launches: Sequence[Launch]) -> None:
    """The launches reach every kernel of a package, and all of them compile for all of TARGETS."""
    found = {_place(launcher.kernel) for launcher in _launchers(package)}
    reached = {_place(launch.kernel) for launch in launches}
    assert found == reached, f"not launched: {sorted(found - reached)}; not in {package}: {sorted(reached - found)}"
    work = [
        (launch, target)
        for target, (backend, _, _) in TARGETS.items()
        for launch in launches
        if launch.targets in ("", backend)
    ]
    _work[:] = work
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        failures = [failure for failure in pool.map(_failure, range(len(work)), chunksize=4) if failure]
    assert not failures, "\n".join(failures)


def _launchers(package: str) -> Iterator[Launcher]:
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__, f"{package}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Launcher):
                yield value


def _place(kernel: Any) -> tuple[str, str]:
    return kernel.fn.__module__, kernel.__name__


# What the processes that compile, one for each processor, find here: they are forked, since kernels cannot be pickled.
_work: list[tuple[Launch, str]] = []


def _failure(place: int) -> str:
    """What goes wrong with one piece of the work; "" for nothing."""
    launch, target = _work[place]
    try:
        text = compiled(launch, target)
    except Exception as error:
        return f"{target}: {launch}: {type(error).__name__}: {error}"
    return "" if launch.name in text else f"{target}: {launch}: its name is not in the assembly"


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[Any]]]:
    """What a launch on a GPU would specialise on: types, constants, and what is divisible by 16."""
    names = launch.kernel.arg_names
    values = [*launch.arguments, *launch.constants.values()]
    if names[len(launch.arguments) :] != list(launch.constants):
        raise AssertionError(f"{launch.name} takes {names}, and was launched with {list(launch.constants)} at the end")
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[Any]] = {}
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        kind = "constexpr" if name in launch.constants else _type(value)
        types[name] = kind
        if kind == "constexpr":
            constants[place,] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):  # a TensorDescriptor
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    raise TypeError(f"a kernel cannot take {type(value).__name__}")
