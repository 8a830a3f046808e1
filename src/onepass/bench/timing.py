"""Times several callables against each other: interleaved, so that a clock that drifts or a neighbour who wakes up hits
all of them alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 << 20  # written before each call that is timed on a GPU: more than any GPU's L2 holds
CYCLES_PER_SECOND = 2e9  # of the GPU's clock, roughly; sleeping longer than needed does no harm
SLEEP_SECONDS = (2e-4, 5e-3)  # a GPU sleeps at least and at most this long while the host launches a call
DEVICE_CALLS = (3, 25)  # timed calls in one sample of a GPU's time
HOST_BATCH = 100  # calls in a row before the queue is let run empty


@dataclass
class Samples:
    """Seconds per call: one sample per repeat, each of `calls` calls."""

    calls: int
    seconds: list[float] = field(default_factory=list)


class Clock(Protocol):
    """A way to time calls."""

    def calls(self, call: Call, reset: Call | None) -> int:
        """How many calls one sample takes; warms the call up."""

    def sample(self, call: Call, reset: Call | None, calls: int) -> float:
        """Seconds per call over `calls` calls; `reset` goes before each, untimed."""


@dataclass(frozen=True)
class WallClock:
    """Wall time of calls in a row, on the CPU: the mean over about `sample_seconds`."""

    sample_seconds: float

    def calls(self, call: Call, reset: Call | None) -> int:
        return calls_for(_together(call, reset), self.sample_seconds)

    def sample(self, call: Call, reset: Call | None, calls: int) -> float:
        if reset is None:
            return _wall_seconds(call, calls) / calls
        total = 0.0
        for _ in range(calls):
            reset()
            total += _wall_seconds(call, 1)
        return total / calls


class DeviceClock:
    """The device's time of a call on a GPU, its caches cold: the median over calls that add up to `sample_seconds`.

    Before each call the L2 is overwritten and the GPU sleeps while the host launches the call, so that its kernels run
    back to back; two events around them take the time. A call that waits for the GPU itself is timed with its waits.
    """

    def __init__(self, sample_seconds: float, device: str = "cuda") -> None:
        self.sample_seconds = sample_seconds
        self.flushed = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._cycles: dict[Call, int] = {}

    def calls(self, call: Call, reset: Call | None) -> int:
        host = []
        for _ in range(3):
            if reset is not None:
                reset()
            torch.cuda.synchronize()
            host.append(_wall_seconds(call, 1))
        torch.cuda.synchronize()
        low, high = SLEEP_SECONDS
        self._cycles[call] = int(CYCLES_PER_SECOND * min(high, max(low, 2.0 * min(host))))
        few, many = DEVICE_CALLS
        seconds = max(1e-9, self.sample(call, reset, few))  # a call may launch nothing
        return max(few, min(many, math.ceil(self.sample_seconds / seconds)))

    def sample(self, call: Call, reset: Call | None, calls: int) -> float:
        events = []
        for _ in range(calls):
            if reset is not None:
                reset()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            torch.cuda._sleep(self._cycles[call])
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return 1e-3 * statistics.median(start.elapsed_time(end) for start, end in events)


@dataclass(frozen=True)
class HostClock:
    """The host's time of a call on a GPU: wall time of calls in a row that do not wait for it.

    The queue runs empty, untimed, every HOST_BATCH calls: a full one would make the host wait. Calls must be so small
    that the GPU keeps ahead.
    """

    sample_seconds: float

    def calls(self, call: Call, reset: Call | None) -> int:
        calls = calls_for(call, self.sample_seconds)
        torch.cuda.synchronize()
        return calls

    def sample(self, call: Call, reset: Call | None, calls: int) -> float:
        total = 0.0
        for first in range(0, calls, HOST_BATCH):
            total += _wall_seconds(call, min(HOST_BATCH, calls - first))
            torch.cuda.synchronize()
        return total / calls


class OwnClock:
    """For calls that return how many seconds they took: a sample is one call."""

    def calls(self, call: Call, reset: Call | None) -> int:
        return 1

    def sample(self, call: Call, reset: Call | None, calls: int) -> float:
        if reset is not None:
            reset()
        seconds = call()
        if not isinstance(seconds, float):
            raise TypeError(f"a call that times itself returns its seconds, not {seconds!r}")
        return seconds


def _wall_seconds(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _together(call: Call, reset: Call | None) -> Call:
    return call if reset is None else lambda: (reset(), call())


def calls_for(call: Call, sample_seconds: float) -> int:
    """How many calls in a row last about `sample_seconds`; at least one. The first call, which may warm things up, is
    not counted.
    """
    call()
    calls = 1
    while True:
        elapsed = _wall_seconds(call, calls)
        if elapsed >= 0.2 * sample_seconds:
            return max(1, math.ceil(calls * sample_seconds / elapsed))
        calls *= 4


def interleaved(
    providers: Mapping[str, Call],
    repeats: int,
    clock: Clock,
    between: Callable[[], None] = lambda: None,
    resets: Mapping[str, Call] | None = None,
) -> dict[str, Samples]:
    """Take `repeats` samples of every provider in turn by the clock; `between` runs once a repeat.

    `resets` gives calls that go before each timed call of a provider, untimed. The order rotates from repeat to repeat,
    so that nobody always follows the same neighbour. Garbage is collected between repeats only.
    """
    resets = resets or {}
    samples = {name: Samples(clock.calls(call, resets.get(name))) for name, call in providers.items()}
    names = list(providers)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                seconds = clock.sample(providers[name], resets.get(name), samples[name].calls)
                samples[name].seconds.append(seconds)
            between()
            gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    return samples
