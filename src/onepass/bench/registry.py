"""What a benchmark is made of, and where they are: every operation's folder may hold a `bench.py`, or a folder
`bench`, that defines `BENCHMARK`.

Those of whole models lie in `onepass.bench`, since operations know nothing of models.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Value = int | float | str | bool


class SkippedError(Exception):
    """Raised by a case's `prepare`: ours cannot do it here yet. The case is left out, and the result says why."""


@dataclass(frozen=True)
class Prepared:
    """One case with its inputs made: what each provider runs, and how its numbers are checked.

    providers: name -> a call without arguments that is timed. The first is ours, the others are peers.
    errors:    runs every provider once and returns its worst error against fp64 in units of the error budget (1 = the
               budget). A peer that is not in it is not timed; `absent` then says why.
    grad:      autograd records while it runs.
    absent:    peer -> why it is left out: it is not installed, or it failed.
    resets:    provider -> a call that restores what the provider overwrites; it goes before each timed call, untimed.
    own:       further providers that are ours, for comparing ours with ours: they too are held to one budget.
    keep:      what is to live as long as the calls do: a temporary folder, say.
    """

    providers: Mapping[str, Callable[[], object]]
    errors: Callable[[], Mapping[str, float]]
    grad: bool = False
    absent: dict[str, str] = field(default_factory=dict)
    resets: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    keep: object = None


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    flops, min_bytes: of one call, counting only what must be done (no masked products; each input and output once);
                      0 = not counted.
    bytes_of:         the same as min_bytes for providers whose inputs have another size (a cache in another format).
    items:            what one call makes (tokens, say), for rates; 0 = not counted.
    bars:             what is to be reached, by the names in `report.BARS`.
    memory:           also measure the peak memory of each provider: on the CPU beyond inputs and outputs, on a GPU
                      beyond the inputs.
    quick:            part of a quick run.
    """

    name: str
    params: Mapping[str, Value]
    dtype: str
    prepare: Callable[[], Prepared]
    flops: float = 0.0
    min_bytes: float = 0.0
    bytes_of: Mapping[str, float] = field(default_factory=dict)
    items: int = 0
    bars: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other and share a geometric mean of their ratios.

    mean_bar:      what the geometric mean of the ratios is to reach; 0 = nothing.
    mean_bars:     peer -> the same of the ratios to it, over the cases that have a bar against it.
    last_rate_bar: the share of the first case's items per second that the last case is to keep; 0 = nothing.
    settings:      environment variables the group needs; it then runs in a process of its own.
    device:        "cpu" or "cuda", where it runs.
    clock:         what is timed: "device", on a GPU the time of its kernels, on a CPU a call's; "host", on a GPU what a
                   call costs the host; "own", the seconds that a call itself returns.
    most_repeats:  samples of each provider at most; 0 = as many as the run's settings say.
    unit:          how a time is shown: "s", "ms" or "us".
    axis:          the parameter along which cases are drawn as a curve; empty = as bars.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    mean_bar: float = 0.0
    mean_bars: Mapping[str, float] = field(default_factory=dict)
    last_rate_bar: float = 0.0
    settings: Mapping[str, str] = field(default_factory=dict)
    unit: str = "ms"
    axis: str = ""
    device: str = "cpu"
    clock: str = "device"
    most_repeats: int = 0


@dataclass(frozen=True)
class Benchmark:
    """All groups of one operation or model, those of every device."""

    name: str
    groups: tuple[Group, ...]

    def on(self, device: str) -> tuple[Group, ...]:
        """The groups that run on "cpu" or "cuda"."""
        return tuple(group for group in self.groups if group.device == device)

    def group(self, name: str) -> Group:
        """The group of that name; ValueError names those there are."""
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(
            f"benchmark {self.name!r} has no group {name!r}; it has: {', '.join(g.name for g in self.groups)}"
        )


OF_MODELS = {"generation": "onepass.bench.generation"}


def modules() -> dict[str, str]:
    """The module of every benchmark by the benchmark's name: those of operations in alphabetical order, then those of
    models.
    """
    import onepass.ops

    folders = sorted(module.name for module in pkgutil.iter_modules(onepass.ops.__path__) if module.ispkg)
    candidates = {name: f"onepass.ops.{name}.bench" for name in folders}
    return {
        name: module for name, module in candidates.items() if importlib.util.find_spec(module) is not None
    } | OF_MODELS


def find(name: str) -> Benchmark:
    """The benchmark of one operation or model; ValueError names those there are."""
    found = modules()
    if name not in found:
        raise ValueError(f"there is no benchmark {name!r}; there are: {', '.join(found)}")
    benchmark: Benchmark = importlib.import_module(found[name]).BENCHMARK
    return benchmark
