"""What the first call of a process on a GPU takes where nothing is compiled yet, and with warm caches on the disk.

Each call is a new process with its own folder for what Triton and torch.compile keep; before its clock starts it loads
PyTorch (for a peer torch.compile, too, which makes it look a little quicker), what PyTorch's autograd loads when it is
used first, and makes its inputs; a backward's are those of a forward. It waits for the GPU before the clock stops.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import onepass
from onepass.bench import problems
from onepass.bench.problems import BACKWARD, FORWARD, first_line
from onepass.bench.registry import Case, Group, Prepared, SkippedError
from onepass.ops.attention.bench import contenders, decode
from onepass.ops.attention.bench.contenders import FLEX
from onepass.ops.attention.bench.problem import Problem, constants, draw

BF16 = torch.bfloat16
PROBLEM = Problem(2, 8, 1000, 128, causal=True)
SECONDS = 5.0  # at most, of which nearly all is compilation
REPEATS = 3  # each process takes seconds
TIMEOUT = 300.0  # seconds
FAILED, REFUSED = "failed", "refused"  # what a process tells in place of its figures
_CHILD = "import sys; from onepass.ops.attention.bench import first_call; first_call.main(sys.argv[1:])"
FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


class Timed(NamedTuple):
    """A call, its error in budgets, which runs it again, and whether autograd records both."""

    call: Callable[[], object]
    error: Callable[[], float]
    grad: bool = False


def attention_call(direction: str, provider: str, device: str) -> Timed:
    fixed = constants(PROBLEM, device, BF16)
    inputs = draw(PROBLEM, device, BF16)
    build = contenders.ours if provider == problems.OURS[device] else contenders.BUILDERS[provider]
    ready = contenders.set_up(build(PROBLEM, fixed, device, BF16), PROBLEM, inputs, fixed, direction)

    def error() -> float:
        return contenders.check(PROBLEM, direction, inputs, fixed, {provider: ready}, {})[provider]

    return Timed(ready.call, error, grad=direction != FORWARD)


def decode_call(provider: str, device: str) -> Timed:
    size = decode.Size(4, 32, 8, 2048)
    q, k, v = decode.draw(size, device)
    lengths = torch.full((size.batch,), size.seqlen, dtype=torch.int32, device=device)
    cache = decode.contiguous(k, v)
    call = decode.ours(q, cache, lengths, problems.BACKENDS[device])
    return Timed(call, partial(decode.errors_of, call, q, cache, size))


# name -> what makes its call from a provider and a device, and the peers where caches are empty.
CALLS: Mapping[str, tuple[Callable[[str, str], Timed], tuple[str, ...]]] = {
    "forward": (partial(attention_call, FORWARD), (FLEX,)),
    "backward": (partial(attention_call, BACKWARD), (FLEX,)),
    "decode": (decode_call, ()),
}


def measure(name: str, provider: str, device: str, seed: int) -> dict[str, float]:
    """In this process: the seconds of the first call, and the error of the next."""
    torch.manual_seed(seed)
    one = torch.ones(1, device=device, requires_grad=True)
    torch.autograd.grad(one * one, one, one)
    timed = CALLS[name][0](provider, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    with torch.set_grad_enabled(timed.grad):
        start = time.perf_counter()
        timed.call()
        wait()
        return {"seconds": time.perf_counter() - start, "error": timed.error()}


class FirstCall:
    """`measure` in a new process at every call, which returns the seconds. RuntimeError says why a process failed,
    SkippedError why ours refuses the call.

    cache: the folder of what is compiled; None = an empty one at every call. The process that told the error was such a
           first call, too: its seconds are the first that are returned.
    """

    def __init__(self, name: str, provider: str, device: str, cache: Path | None) -> None:
        self.arguments, self.cache = (name, provider, device, str(torch.initial_seed())), cache
        self._kept: list[float] = []

    def error(self) -> float:
        found = self._measure()
        if self.cache is None:
            self._kept.append(found["seconds"])
        return found["error"]

    def __call__(self) -> float:
        return self._kept.pop() if self._kept else self._measure()["seconds"]

    def _measure(self) -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="onepass-first-call-") as empty:
            folder = self.cache or Path(empty)
            variables = [f"{variable}={folder / name}" for variable, name in FOLDERS.items()]
            command = ["env", *variables, sys.executable, "-c", _CHILD, *self.arguments]
            options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT}
            try:
                child = subprocess.run(command, check=False, **options)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"{self._what}: it took more than {TIMEOUT:g} seconds") from error
        if child.returncode != 0:
            last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
            raise RuntimeError(f"{self._what}: {last[0]}")
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        if REFUSED in found:
            raise SkippedError(found[REFUSED])
        if FAILED in found:
            raise RuntimeError(f"{self._what}: {found[FAILED]}")
        return found

    @property
    def _what(self) -> str:
        name, provider, device, _ = self.arguments
        return f"the first call of {name} by {provider} on {device} failed"


def prepare(name: str, warm: bool, device: str) -> Prepared:
    us = problems.OURS[device]
    peers = () if warm else CALLS[name][1]
    folder = tempfile.TemporaryDirectory(prefix="onepass-caches-") if warm else None
    calls = {
        provider: FirstCall(name, provider, device, None if folder is None else Path(folder.name, str(number)))
        for number, provider in enumerate((us, *peers))
    }
    absent: dict[str, str] = {}

    def errors() -> dict[str, float]:
        found = {}
        for provider, call in calls.items():
            try:
                found[provider] = call.error()
            except RuntimeError as error:
                if provider == us:
                    raise
                absent[provider] = first_line(error)
        return found

    return Prepared(calls, errors, absent=absent, keep=folder)


def case(name: str, warm: bool) -> Case:
    title = f"{name}, warm cache" if warm else name
    params: dict[str, Any] = {"call": name, "warm": warm}
    bars = {} if warm else {"seconds": SECONDS}
    return Case(title, params, "bfloat16", partial(prepare, name, warm, "cuda"), bars=bars)


GROUP = Group(
    "cuda-first-call",
    "First call of a process, bf16, with empty caches of compiled kernels and with warm ones",
    (*(case(name, warm=False) for name in CALLS), *(case(name, warm=True) for name in CALLS)),
    unit="s",
    device="cuda",
    clock="own",
    most_repeats=REPEATS,
)


def main(arguments: Sequence[str]) -> None:
    """In a new process: figures, or why there are none, as the last line of what it prints."""
    name, provider, device, seed = arguments
    told: dict[str, Any]
    try:
        told = dict(measure(name, provider, device, int(seed)))
    except onepass.UnsupportedError as error:
        told = {REFUSED: str(contenders.refusal(error, problems.BACKENDS[device]))}
    except Exception as error:
        told = {FAILED: first_line(error)}
    print(json.dumps(told))
