"""Times several callables against each other: interleaved, so that a clock that drifts or a neighbour who wakes up hits
all of them alike.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Seconds per call: one sample per repeat, each the mean over `calls` calls in a row."""

    calls: int
    seconds: list[float] = field(default_factory=list)


def calls_for(call: Callable[[], object], sample_seconds: float) -> int:
    """How many calls in a row last about `sample_seconds`; at least one. The first call, which may warm things up, is
    not counted.
    """
    call()
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter() - start
        if elapsed >= 0.2 * sample_seconds:
            return max(1, math.ceil(calls * sample_seconds / elapsed))
        calls *= 4


def interleaved(
    providers: Mapping[str, Callable[[], object]],
    repeats: int,
    sample_seconds: float,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Take `repeats` samples of every provider in turn, each lasting about `sample_seconds`; `between` runs once a
    repeat.

    The order rotates from repeat to repeat, so that nobody always follows the same neighbour. Garbage is collected
    between repeats only.
    """
    samples = {name: Samples(calls_for(call, sample_seconds)) for name, call in providers.items()}
    names = list(providers)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                call, calls = providers[name], samples[name].calls
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                samples[name].seconds.append((time.perf_counter() - start) / calls)
            between()
            gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    return samples
