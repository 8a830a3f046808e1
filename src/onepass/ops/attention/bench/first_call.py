"""What the first call of a process on a GPU takes where nothing is compiled yet, and with warm caches on the disk.

Each call is a new process with its own folder for what Triton and torch.compile keep; it loads PyTorch and makes its
inputs before its clock starts, and waits for the GPU before the clock stops.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from onepass.bench import problems
from onepass.bench.problems import BOTH, FORWARD, first_line
from onepass.bench.registry import Case, Group, Prepared
from onepass.ops.attention.bench import contenders, decode
from onepass.ops.attention.bench.contenders import FLEX
from onepass.ops.attention.bench.problem import Problem, constants, draw

BF16 = torch.bfloat16
PROBLEM = Problem(2, 8, 1000, 128, causal=True)
SECONDS = 5.0  # at most, of compilation
REPEATS = 3
_CHILD = "import sys; from onepass.ops.attention.bench import first_call; first_call.main(sys.argv[1:])"
FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


class Timed(NamedTuple):
    """A call and its error in budgets, which runs it again."""

    call: Callable[[], object]
    error: Callable[[], float]


def attention_call(direction: str, provider: str, device: str) -> Timed:
    fixed = constants(PROBLEM, device, BF16)
    inputs = draw(PROBLEM, device, BF16)
    build = contenders.BUILDERS.get(provider, contenders.ours)
    ready = contenders.set_up(build(PROBLEM, fixed, device, BF16), PROBLEM, inputs, fixed, direction)

    def error() -> float:
        with torch.set_grad_enabled(direction != FORWARD):
            return contenders.check(PROBLEM, direction, inputs, fixed, {provider: ready}, {})[provider]

    return Timed(ready.call, error)


def decode_call(provider: str, device: str) -> Timed:
    size = decode.Size(4, 32, 8, 2048)
    q, k, v = decode.draw(size, device)
    lengths = torch.full((size.batch,), size.seqlen, dtype=torch.int32, device=device)
    cache = decode.contiguous(k, v)
    call = decode.ours(q, cache, lengths, problems.BACKENDS[device])
    return Timed(call, partial(decode.errors_of, call, q, cache, size))


# name -> what makes its call from a provider and a device, and the peers.
CALLS: Mapping[str, tuple[Callable[[str, str], Timed], tuple[str, ...]]] = {
    "forward": (partial(attention_call, FORWARD), (FLEX,)),
    "forward + backward": (partial(attention_call, BOTH), (FLEX,)),
    "decode": (decode_call, ()),
}


def measure(name: str, provider: str, device: str) -> dict[str, float]:
    """In this process: the seconds of the first call, and the error of the next."""
    timed = CALLS[name][0](provider, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with torch.set_grad_enabled(name == "forward + backward"):
        timed.call()
    wait()
    return {"seconds": time.perf_counter() - start, "error": timed.error()}


class FirstCall:
    """`measure` in a new process at every call, which returns the seconds.

    cache: the folder of what is compiled; None = an empty one at every call. The process that told the error was such a
           first call, too: its seconds are the first that are returned.
    """

    def __init__(self, name: str, provider: str, device: str, cache: Path | None) -> None:
        self.arguments, self.cache = (name, provider, device), cache
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
            environment = os.environ | {variable: str(folder / name) for variable, name in FOLDERS.items()}
            command = [sys.executable, "-c", _CHILD, *self.arguments]
            child = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if child.returncode != 0:
            last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
            raise RuntimeError(f"the first call of {' '.join(self.arguments)} failed: {last[0]}")
        found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
        return found


def prepare(name: str, warm: bool, device: str) -> Prepared:
    us = problems.OURS[device]
    folder = tempfile.TemporaryDirectory(prefix="onepass-caches-") if warm else None
    calls = {
        provider: FirstCall(name, provider, device, None if folder is None else Path(folder.name, str(number)))
        for number, provider in enumerate((us, *CALLS[name][1]))
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
    "First call of a process, bf16, nothing compiled before",
    (*(case(name, warm=False) for name in CALLS), *(case(name, warm=True) for name in CALLS)),
    unit="s",
    device="cuda",
    clock="own",
    repeats=REPEATS,
)


def main(arguments: Sequence[str]) -> None:
    name, provider, device = arguments
    print(json.dumps(measure(name, provider, device)))
