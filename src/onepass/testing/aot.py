"""Triton kernels compiled ahead of time for architectures that this machine need not have.

    call = lambda: fwd.forward(x)                            # nothing runs: only what would have been launched
    aot.assert_every_kernel_compiles("onepass.ops.softmax.triton", call)
    kernel = aot.compiled(aot.recorded(call, "sm_90")[0], "sm_90")     # PTX or AMD assembly, memory

The launches are those that the operation's own host code makes for a target, with its configurations, strides and
constants. Triton must not be interpreted: where TRITON_INTERPRET=1 there is nothing to compile, and `recorded` raises.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onepass.core import device, env
from onepass.core.triton_backend import Launcher, shared_memory

# (backend, architecture, threads in a warp) as Triton names them.
TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}
SHARED_OUT = False  # the launches of each kernel among TARGETS, in turn; each target has one of every kernel at least
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
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
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


@dataclass(frozen=True)
class Compiled:
    """A kernel for a target: its assembly, and bytes of shared memory (of a program) and local memory (of a thread)."""

    text: str
    shared: int
    local: int


def recorded(call: Callable[[], Any], target: str) -> list[Launch]:
    """The launches that `call()`, with tensors on the CPU, would make on that GPU, each different one once.

    None of them runs; outputs are uninitialised.
    """
    if env.triton_interpreted():
        raise RuntimeError("with TRITON_INTERPRET=1 kernels are Python functions and cannot be compiled")
    launches: dict[str, Launch] = {}
    add = lambda launch: launches.setdefault(str((_signature(launch), str(launch))), launch)  # noqa: E731
    with _recording(add), _as_if_on(target):
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
        follows: bool = False,
    ) -> None:
        options, nvidia = {"num_warps": num_warps}, {**self.nvidia_options, "launch_pdl": follows}
        add(Launch(self.kernel, tuple(arguments), dict(constants), options, nvidia, self.targets))

    ordinary = Launcher.launch
    Launcher.launch = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launcher.launch = ordinary  # type: ignore[method-assign]


@contextmanager
def _as_if_on(target: str) -> Iterator[None]:
    """Inside, configurations are those of the target."""
    ordinary = device.arch
    device.arch = lambda tensor: target
    try:
        yield
    finally:
        device.arch = ordinary


def compiled(launch: Launch, target: str) -> Compiled:
    """One launch for one of TARGETS. Raises what Triton raises when it does not compile."""
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
        if backend == "cuda":
            return Compiled(kernel.asm["ptx"], kernel.metadata.shared, _local_memory(kernel.asm["cubin"], folder))
        text = kernel.asm["amdgcn"]
        sizes = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return Compiled(text, kernel.metadata.shared, max(map(int, sizes), default=0))


def _local_memory(cubin: bytes, folder: str) -> int:
    """Bytes that a thread spills, as cuobjdump (which comes with Triton) reads them."""
    import triton

    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def unconditional_copies(ptx: str) -> list[str]:
    """Asynchronous copies whose size is set to a number: nothing can make it 0, as it must be where no loop runs."""
    sizes = set(re.findall(r"cp\.async\.c.*, (%r\d+);", ptx))
    return [size for size in sizes if re.search(rf"mov\.[bu]32\s+{size}, \d+;", ptx)]


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


Fault = Callable[[Launch, str, Compiled], str]  # launch, target, kernel: what is wrong with it, "" for nothing


def _no_fault(launch: Launch, target: str, kernel: Compiled) -> str:
    return ""


def assert_every_kernel_compiles(package: str, call: Callable[[], Any], fault: Fault = _no_fault) -> None:
    """The launches of `call` reach every kernel of a package on each of TARGETS (those in Gluon, which are for one
    chip, on any), and compile within its memory.
    """
    _work[:] = []
    _fault[:] = [fault]
    kernels = {_place(launcher.kernel): launcher for launcher in _launchers(package)}
    everywhere: set[tuple[str, str]] = set()
    for turn, (target, (backend, _, _)) in enumerate(TARGETS.items()):
        launches = [launch for launch in recorded(call, target) if launch.targets in ("", backend)]
        reached = {_place(launch.kernel) for launch in launches}
        everywhere |= reached
        wanted = [place for place, launcher in kernels.items() if launcher.targets in ("", backend)]
        missing = [place for place in wanted if place not in reached and not kernels[place].kernel.is_gluon()]
        assert not missing, f"{target}: not launched: {missing}"
        _work.extend((launch, target) for launch in (_share(launches, turn) if SHARED_OUT else launches))
    missing, unknown = sorted(set(kernels) - everywhere), sorted(everywhere - set(kernels))
    assert set(kernels) == everywhere, f"not launched: {missing}; not in {package}: {unknown}"
    # Not multiprocessing.Pool: it would wait for ever for a process that crashed, or that has a handler for SIGTERM.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        failures = [failure for failure in pool.map(_failure, range(len(_work))) if failure]
    assert not failures, "\n".join(failures)


def _share(launches: Sequence[Launch], turn: int) -> list[Launch]:
    """One of len(TARGETS) shares of each kernel's launches; all of what few or one kind of GPU alone has."""
    of_kernel: dict[tuple[str, ...], list[Launch]] = {}
    for launch in launches:
        of_kernel.setdefault((*_place(launch.kernel), launch.targets), []).append(launch)
    count = len(TARGETS)
    return [
        launch
        for (*_, targets), some in of_kernel.items()
        for launch in (some if targets or len(some) < count else some[turn::count])
    ]


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
_fault: list[Fault] = []


def _failure(place: int) -> str:
    """What goes wrong with one piece of the work; "" for nothing."""
    launch, target = _work[place]
    try:
        kernel = compiled(launch, target)
    except Exception as error:
        return f"{target}: {launch}: {type(error).__name__}: {error}"
    if launch.name not in kernel.text:
        return f"{target}: {launch}: its name is not in the assembly"
    if kernel.shared > shared_memory(target):
        return f"{target}: {launch}: {kernel.shared} bytes of shared memory, {shared_memory(target)} are there"
    wrong = _fault[0](launch, target, kernel)
    return wrong and f"{target}: {launch}: {wrong}"


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
