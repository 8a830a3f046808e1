"""Runs a benchmark and writes its JSON: numbers are checked before they are timed, and a group can be measured again on
its own.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onepass.bench import bandwidth, environment, registry, timing
from onepass.bench.peak import fma_peak
from onepass.core.files import replace_file
from onepass.testing.memory import peak_bytes

PEER_ERROR_LIMIT = 100.0  # budgets; a peer further from fp64 than this does not compute the same thing
PEAK_SECONDS = 0.02
WRONG_NUMBERS = 3  # exit status of a child process whose numbers failed the check


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    num_threads:    of PyTorch and onepass alike.
    repeats:        samples of each provider, interleaved; at least seven for a figure that is published.
    sample_seconds: about how long one sample lasts; a call that lasts longer is its own sample.
    quick:          only the cases marked quick.
    seed:           of the inputs.
    """

    num_threads: int = 2
    repeats: int = 9
    sample_seconds: float = 0.02
    quick: bool = False
    seed: int = 0


class NumericsError(RuntimeError):
    """A provider's numbers are wrong, so its time means nothing."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the samples."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def counts_bytes(case: registry.Case) -> bool:
    """Whether a case is bound by memory: its bytes count, since it has no flops that do."""
    return bool(case.min_bytes) and not case.flops


def summarise(
    case: registry.Case,
    samples: Mapping[str, timing.Samples],
    peaks: Sequence[float] = (),
    roofline: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What follows from the samples: times, the best peer, the ratio to it; GFLOP/s and percent of the measured peak,
    or GB/s and percent of the measured bandwidth of copies.

    A ratio is taken within each repeat, so that both sides saw the same machine; the best peer is the one with the
    lowest median.
    """
    ours, *peers = samples
    times = {name: spread(sample.seconds) for name, sample in samples.items()}
    found: dict[str, Any] = {"seconds": times}
    if peers:
        best = min(peers, key=lambda name: times[name]["median"])
        found["best_peer"] = best
        found["ratios"] = {
            peer: spread(
                [theirs / mine for theirs, mine in zip(samples[peer].seconds, samples[ours].seconds, strict=True)]
            )
            for peer in peers
        }
    if case.flops:
        found["gflops"] = {name: 1e-9 * case.flops / time["median"] for name, time in times.items()}
    if case.flops and peaks:
        found["peak_gflops"] = statistics.median(peaks)
        found["percent_of_peak"] = {name: 100.0 * rate / found["peak_gflops"] for name, rate in found["gflops"].items()}
    if counts_bytes(case):
        found["gbps"] = {
            name: 1e-9 * case.bytes_of.get(name, case.min_bytes) / time["median"] for name, time in times.items()
        }
    if counts_bytes(case) and roofline:
        found["percent_of_bandwidth"] = {name: 100.0 * rate / roofline["copy"] for name, rate in found["gbps"].items()}
    if case.items:
        found["items_per_second"] = {name: case.items / time["median"] for name, time in times.items()}
    return found


def check_numerics(group: str, case: registry.Case, prepared: registry.Prepared) -> dict[str, float]:
    """The errors of those whose numbers are right. Raises NumericsError when ours is outside its budget; a peer that
    computes something else is left out, and `prepared.absent` says so.
    """
    ours = next(iter(prepared.providers))
    kept = {}
    for name, error in prepared.errors().items():
        limit = 1.0 if name == ours or name in prepared.own else PEER_ERROR_LIMIT
        wrong = f"{error:.3g} error budgets from fp64, not {limit:g}"
        if error <= limit:
            kept[name] = error
        elif limit == 1.0:
            raise NumericsError(f"{group}, {case.name}: {name} is {wrong}; it was not timed")
        else:
            prepared.absent[name] = f"its numbers are wrong: {wrong}"
    return kept


def extra_memory(call: Callable[[], object]) -> int:
    """Peak bytes of one call beyond its inputs and its output, a tensor."""
    output = call()
    output_bytes = output.untyped_storage().nbytes() if isinstance(output, torch.Tensor) else 0
    del output
    return max(0, peak_bytes(call) - output_bytes)


def run_case(
    group: registry.Group, case: registry.Case, settings: Settings, roofline: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Check and measure one case."""
    torch.manual_seed(settings.seed)
    prepared = case.prepare()
    with torch.set_grad_enabled(prepared.grad):
        return _run_prepared(group, case, prepared, settings, roofline)


def clock(group: registry.Group, settings: Settings) -> timing.Clock:
    """How the group's calls are timed."""
    if group.clock == "own":
        return timing.OwnClock()
    if group.device == "cpu":
        return timing.WallClock(settings.sample_seconds)
    if group.clock == "host":
        return timing.HostClock(settings.sample_seconds)
    return timing.DeviceClock(settings.sample_seconds / 8)


def repeats(group: registry.Group, settings: Settings) -> int:
    """Samples of each provider."""
    return min(settings.repeats, group.most_repeats or settings.repeats)


def _run_prepared(
    group: registry.Group,
    case: registry.Case,
    prepared: registry.Prepared,
    settings: Settings,
    roofline: Mapping[str, float] | None,
) -> dict[str, Any]:
    errors = check_numerics(group.name, case, prepared)
    providers = {name: call for name, call in prepared.providers.items() if name in errors}
    dtype: torch.dtype = getattr(torch, case.dtype)
    peaks: list[float] = []

    def measure_peak() -> None:
        if case.flops and group.device == "cpu":
            peaks.append(fma_peak(dtype, settings.num_threads, PEAK_SECONDS))

    samples = timing.interleaved(
        providers,
        repeats(group, settings),
        clock(group, settings),
        between=measure_peak,
        resets=prepared.resets,
    )
    row: dict[str, Any] = {
        "name": case.name,
        "params": dict(case.params),
        "dtype": case.dtype,
        "flops": case.flops,
        "min_bytes": case.min_bytes,
        "bytes_of": dict(case.bytes_of),
        "items": case.items,
        "bars": dict(case.bars),
        "error_in_budgets": errors,
        "absent": dict(prepared.absent),
        "summary": summarise(case, samples, peaks, roofline),
        "samples": {name: dataclasses.asdict(sample) for name, sample in samples.items()},
    }
    if case.memory and group.device == "cpu":
        row["memory_bytes"] = {name: extra_memory(call) for name, call in providers.items()}
    elif case.memory:
        row["peak_bytes"] = {name: peak_bytes(call, group.device) for name, call in providers.items()}
    return row


def run_group(group: registry.Group, settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure one group in this process."""
    cases = [case for case in group.cases if case.quick or not settings.quick]
    before = environment.facts(settings.num_threads, group.device)
    roofline = None
    if any(counts_bytes(case) for case in cases) and group.clock == "device":
        progress(f"{group.name}: how fast the memory is")
        roofline = bandwidth.roofline(group.device, settings.num_threads)
    rows = []
    skipped: dict[str, str] = {}
    for number, case in enumerate(cases, 1):
        progress(f"{group.name} {number}/{len(cases)}: {case.name}")
        try:
            rows.append(run_case(group, case, settings, roofline))
        except registry.SkippedError as reason:
            skipped[case.name] = str(reason)
            progress(f"{group.name}, {case.name} is skipped: {reason}")
        if group.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    after = environment.facts(settings.num_threads, group.device)
    return {
        "title": group.title,
        "device": group.device,
        "unit": group.unit,
        "axis": group.axis,
        "mean_bar": group.mean_bar,
        "mean_bars": dict(group.mean_bars),
        "last_rate_bar": group.last_rate_bar,
        "settings": dataclasses.asdict(settings)
        | {"repeats": repeats(group, settings), "environment": dict(group.settings)},
        "environment": after | {"clocks_before": before["clocks"]},
        "roofline": roofline,
        "geometric_mean": _geometric_mean(rows),
        "skipped": skipped,
        "cases": rows,
    }


def _geometric_mean(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the median ratios to the best peer of each case."""
    ratios = [
        row["summary"]["ratios"][row["summary"]["best_peer"]]["median"] for row in rows if "best_peer" in row["summary"]
    ]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def _run_in_child(
    benchmark: str, group: registry.Group, settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one group in a process with its own environment variables."""
    variables = [f"{name}={value}" for name, value in group.settings.items()]
    options = json.dumps(dataclasses.asdict(settings))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "group.json"
        command = [
            "env",
            *variables,
            sys.executable,
            "-m",
            "onepass.bench.run",
            benchmark,
            group.name,
            options,
            str(out),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            line = ""
            for line in child.stdout:
                progress(line.rstrip("\n"))
        if child.returncode == WRONG_NUMBERS:
            raise NumericsError(line.rstrip("\n"))
        if child.returncode != 0:
            raise RuntimeError(f"measuring {group.name} in its own process failed with exit status {child.returncode}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def run(
    benchmark: registry.Benchmark,
    settings: Settings,
    out: Path,
    groups: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure the named groups (all of the device's when none is named) and return the whole result.

    `out` is written after every group, whole or not at all; groups that are in it already and are not measured now
    stay.
    Raises ValueError for an unknown group or an `out` that holds another benchmark's results. A group with wrong
    numbers is not written; NumericsError is raised when the others are.
    """
    chosen = [benchmark.group(name) for name in groups] or list(benchmark.on(device))
    result: dict[str, Any] = load(out) if out.exists() else {"benchmark": benchmark.name, "groups": {}}
    if result["benchmark"] != benchmark.name:
        raise ValueError(
            f"{out} holds results of {result['benchmark']!r}, not of {benchmark.name!r}; name another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    absent = [group.name for group in chosen if group.device == "cuda" and not torch.cuda.is_available()]
    if absent:
        raise ValueError(f"there is no GPU here for {benchmark.name}: {', '.join(absent)}")
    wrong: list[str] = []
    for group in chosen:
        if settings.quick and not any(case.quick for case in group.cases):
            continue
        try:
            found = _run_anywhere(benchmark.name, group, settings, progress)
        except NumericsError as error:
            wrong.append(str(error))
            continue
        if not found["cases"]:  # all were skipped: a table or a picture of it would be empty
            continue
        result["groups"][group.name] = found
        order = [g.name for g in benchmark.groups if g.name in result["groups"]]
        result["groups"] = {name: result["groups"][name] for name in order}
        replace_file(out, (json.dumps(result, indent=1) + "\n").encode())
    if wrong:
        raise NumericsError("; ".join(wrong))
    return result


def _run_anywhere(
    benchmark: str, group: registry.Group, settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one group in this process, or in one with the environment variables that it needs."""
    if group.settings:
        progress(f"{group.name}: in its own process with {', '.join(f'{k}={v}' for k, v in group.settings.items())}")
        return _run_in_child(benchmark, group, settings, progress)
    with threads(settings.num_threads):
        return run_group(group, settings, progress)


def only(result: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """The result with the named groups alone; all of them when none is named."""
    kept = {name: group for name, group in result["groups"].items() if not groups or name in groups}
    return {**result, "groups": kept}


def load(path: Path) -> dict[str, Any]:
    """A result file; ValueError says what is wrong with one that cannot be read."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no result {path} yet: run without --no-run to measure it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not {"benchmark", "groups"} <= result.keys():
        raise ValueError(f"{path} is not a result of onepass bench: it lacks 'benchmark' or 'groups'")
    return result


class threads:
    """Context manager: PyTorch, and with it onepass, uses this many threads."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; expected 1 or more")
        self.num_threads = num_threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self.before)


def _child_main(benchmark: str, group: str, options: str, out: str) -> int:
    """One group in this process; progress, and in the end what is wrong with the numbers, on stdout."""
    settings = Settings(**json.loads(options))
    try:
        with threads(settings.num_threads):
            found = run_group(registry.find(benchmark).group(group), settings, lambda text: print(text, flush=True))
    except NumericsError as error:
        print(error)
        return WRONG_NUMBERS
    Path(out).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(_child_main(*sys.argv[1:]))
