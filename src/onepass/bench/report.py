"""Tables of a benchmark's result, and whether its bars are reached; everything is read from the JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

TOLERANCE = 0.02  # a ratio's bar is met when its median is at least the bar minus this
RATIO_TO = "ratio to "  # a bar against one peer by name: "ratio to quack"
PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6}


class Bar(NamedTuple):
    """One thing to be reached, and what was measured; `met` is None where it was not, because a peer is absent."""

    group: str
    case: str
    what: str
    measured: float
    bar: float
    met: bool | None

    def __str__(self) -> str:
        return f"{self.group}, {self.case}: {self.what} {self.measured:.4g}, the bar is {self.bar:.4g}"


def console() -> Console:
    """A console for wide tables: as wide as the terminal, and 140 columns where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def ours(case: Mapping[str, Any]) -> str:
    """The name of our provider, which comes first."""
    return str(next(iter(case["samples"])))


def best_ratio(case: Mapping[str, Any]) -> Mapping[str, float]:
    """Median and quartiles of the best peer's time over ours."""
    summary = case["summary"]
    ratio: Mapping[str, float] = summary["ratios"][summary["best_peer"]]
    return ratio


class Kind(NamedTuple):
    """A kind of bar: what it is called, what was measured, and whether that is to be at least or at most the bar."""

    label: str
    measured: Callable[[Mapping[str, Any], str], float]  # of a case and our provider
    at_least: bool = True
    tolerance: float = 0.0


def _summary(what: str) -> Callable[[Mapping[str, Any], str], float]:
    return lambda case, mine: case["summary"][what][mine]


BARS = {
    "ratio": Kind("ratio to the best peer", lambda case, mine: best_ratio(case)["median"], tolerance=TOLERANCE),
    "percent_of_peak": Kind("percent of FMA peak", _summary("percent_of_peak")),
    "gbps": Kind("GB/s", _summary("gbps")),
    "percent_of_bandwidth": Kind("percent of the bandwidth of copies", _summary("percent_of_bandwidth")),
    "seconds": Kind("seconds", lambda case, mine: case["summary"]["seconds"][mine]["median"], at_least=False),
    "peak_bytes": Kind("peak bytes above the inputs", lambda case, mine: case["peak_bytes"][mine], at_least=False),
    "error_to_sdpa": Kind(
        "error against fp64 over sdpa's",
        lambda case, mine: case["error_in_budgets"][mine] / case["error_in_budgets"]["sdpa"],
        at_least=False,
    ),
}


def _kind(group: str, case: Mapping[str, Any], name: str) -> Kind:
    if name.startswith(RATIO_TO):
        peer = name.removeprefix(RATIO_TO)
        return Kind(name, lambda case, mine: case["summary"]["ratios"][peer]["median"], tolerance=TOLERANCE)
    if name not in BARS:
        expected = ", ".join((*BARS, f"{RATIO_TO}PEER"))
        raise ValueError(f"{group}, {case['name']}: there is no bar {name!r}; expected one of {expected}")
    return BARS[name]


def case_bars(group: str, case: Mapping[str, Any]) -> Iterator[Bar]:
    """Every bar of one case. One against a peer that is absent is there, neither met nor missed."""
    for name, bar in case["bars"].items():
        kind = _kind(group, case, name)
        label = f"ratio to {case['summary']['best_peer']}" if name == "ratio" else kind.label
        if name.startswith(RATIO_TO) and name.removeprefix(RATIO_TO) not in case["samples"]:
            yield Bar(group, case["name"], label, math.nan, bar, None)
            continue
        measured = kind.measured(case, ours(case))
        met = measured >= bar - kind.tolerance if kind.at_least else measured <= bar
        yield Bar(group, case["name"], label, measured, bar, met)


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """Every bar of the result, those of the cases first; without geometric means for quick runs, which lack cases."""
    found: list[Bar] = []
    for name, group in result["groups"].items():
        for case in group["cases"]:
            found += case_bars(name, case)
        if group["settings"]["quick"]:
            continue
        if bar := group["mean_bar"]:
            mean = group["geometric_mean"]
            found.append(Bar(name, "all cases", "geometric mean of the ratios", mean, bar, mean >= bar - TOLERANCE))
        found += mean_bars(name, group)
        if bar := group["last_rate_bar"]:
            first, last = (
                case["summary"]["items_per_second"][ours(case)] for case in (group["cases"][0], group["cases"][-1])
            )
            found.append(
                Bar(
                    name,
                    group["cases"][-1]["name"],
                    "rate kept since the first case",
                    last / first,
                    bar,
                    last / first >= bar,
                )
            )
    return found


def mean_bars(name: str, group: Mapping[str, Any]) -> Iterator[Bar]:
    """The bars of the mean ratio to one peer: over the cases that have a bar against it, judged when it ran in all."""
    for peer, bar in group.get("mean_bars", {}).items():
        cases = [case for case in group["cases"] if f"{RATIO_TO}{peer}" in case["bars"]]
        ratios = [case["summary"]["ratios"][peer]["median"] for case in cases if peer in case["samples"]]
        what = f"geometric mean of the ratios to {peer}"
        if not cases or len(ratios) < len(cases):
            yield Bar(name, "all cases", what, math.nan, bar, None)
            continue
        mean = statistics.geometric_mean(ratios)
        yield Bar(name, f"{len(cases)} cases", what, mean, bar, mean >= bar - TOLERANCE)


def _number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def group_table(name: str, group: Mapping[str, Any]) -> Table:
    """One group: a row per case, with times of all providers, the ratio to the best peer and what the case counts."""
    cases: Sequence[Mapping[str, Any]] = group["cases"]
    providers = list(dict.fromkeys(provider for case in cases for provider in case["samples"]))
    columns = [column for column in COLUMNS if any(column.shown(case) for case in cases)]
    table = Table(
        title=f"{group['title']} ({name})", title_justify="left", caption=_caption(group), caption_justify="left"
    )
    table.add_column("case", no_wrap=True)
    for provider in providers:
        table.add_column(f"{provider}\n{group['unit']}", justify="right")
    for column in columns:
        table.add_column(column.heading, justify="right")
    for case in cases:
        style = _style([bar.met for bar in case_bars(name, case)])
        cells = [Text(column.cell(case) if column.shown(case) else "-") for column in columns]
        if columns and columns[0] is RATIO:
            cells[0].stylize(style)
        table.add_row(Text(case["name"]), *_times(case, providers, PER_SECOND[group["unit"]]), *cells)
    return table


def _style(met: Sequence[bool | None]) -> str:
    if False in met:
        return "red"
    return "green" if True in met else ""


def _times(case: Mapping[str, Any], providers: Sequence[str], unit: float) -> Iterator[Text]:
    for provider in providers:
        time = case["summary"]["seconds"].get(provider)
        yield Text(_number(time["median"] * unit) if time else "-")


class Column(NamedTuple):
    """A column behind the times: for which cases there is something to show, and what."""

    heading: str
    shown: Callable[[Mapping[str, Any]], bool]
    cell: Callable[[Mapping[str, Any]], str]


def _ratio_cell(case: Mapping[str, Any]) -> str:
    ratio = best_ratio(case)
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _rate_cell(rate: str, percent: str) -> Callable[[Mapping[str, Any]], str]:
    """Our rate, and the percentage of the roof where that was measured."""

    def cell(case: Mapping[str, Any]) -> str:
        summary, mine = case["summary"], ours(case)
        of_roof = f" ({summary[percent][mine]:.0f} %)" if percent in summary else ""
        return f"{_number(summary[rate][mine])}{of_roof}"

    return cell


def _items_cell(case: Mapping[str, Any]) -> str:
    rates = case["summary"]["items_per_second"]
    return f"{_number(rates[ours(case)])} / {_number(rates[case['summary']['best_peer']])}"


def _memory_cell(what: str) -> Callable[[Mapping[str, Any]], str]:
    """Our bytes and those of one peer: sdpa where there is one, else the best."""

    def cell(case: Mapping[str, Any]) -> str:
        peer = "sdpa" if "sdpa" in case[what] else case["summary"].get("best_peer")
        return " / ".join(_bytes(case[what][name]) for name in (ours(case), peer) if name in case[what])

    return cell


RATIO = Column("ratio to best\n(quartiles)", lambda case: "best_peer" in case["summary"], _ratio_cell)
COLUMNS = (
    RATIO,
    Column("GFLOP/s\n(% of peak)", lambda case: bool(case["flops"]), _rate_cell("gflops", "percent_of_peak")),
    Column("GB/s\n(% of copy)", lambda case: "gbps" in case["summary"], _rate_cell("gbps", "percent_of_bandwidth")),
    Column("per second\nours / best peer", lambda case: bool(case["items"]), _items_cell),
    Column("extra memory\nours / peer", lambda case: "memory_bytes" in case, _memory_cell("memory_bytes")),
    Column("peak memory\nours / peer", lambda case: "peak_bytes" in case, _memory_cell("peak_bytes")),
    Column("error in\nbudgets", lambda case: True, lambda case: f"{case['error_in_budgets'][ours(case)]:.2f}"),
)


def machine(facts: Mapping[str, Any]) -> str:
    """The device and the versions that matter, on one line."""
    if "gpu" in facts:
        versions = "".join(f", {name} {version}" for name, version in facts["versions"].items())
        return f"{facts['gpu']}, torch {facts['torch']}{versions}"
    return f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, torch {facts['torch']}"


def absent_peers(group: Mapping[str, Any]) -> dict[str, str]:
    """Peers that some case had to do without -> which cases, and why."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case in group["cases"]:
        for peer, reason in case.get("absent", {}).items():
            cases.setdefault((peer, reason), []).append(case["name"])
    found: dict[str, str] = {}
    for (peer, reason), names in cases.items():
        where = "" if len(names) == len(group["cases"]) else f" ({'; '.join(names)})"
        found[peer] = f"{found[peer]}; {reason}{where}" if peer in found else f"{reason}{where}"
    return found


def _caption(group: Mapping[str, Any]) -> str:
    settings = group["settings"]
    several = len(group["cases"]) > 1 and group["geometric_mean"] is not None
    mean = f"geometric mean of the ratios {group['geometric_mean']:.2f}; " if several else ""
    roof = group.get("roofline")
    lines = [
        f"{mean}{machine(group['environment'])}, {settings['repeats']} interleaved repeats"
        f"{', quick' if settings['quick'] else ''}"
    ]
    if roof:
        lines.append(
            f"measured with it: copies {roof['copy']:.0f} GB/s, reads {roof['read']:.0f} GB/s"
            f"{'; what fits into caches may be faster' if group.get('device', 'cpu') == 'cpu' else ''}"
        )
    lines += [f"without {peer}: {reason}" for peer, reason in absent_peers(group).items()]
    return "\n".join(lines + [f"skipped, {case}: {reason}" for case, reason in group.get("skipped", {}).items()])


def tables(result: Mapping[str, Any]) -> list[Table]:
    """One table per group."""
    return [group_table(name, group) for name, group in result["groups"].items()]


def verdict(result: Mapping[str, Any]) -> list[Text]:
    """How many bars are met, and a line for each that is not."""
    found = bars(result)
    judged = [bar for bar in found if bar.met is not None]
    missed = [bar for bar in judged if not bar.met]
    lines = []
    if judged:
        text = f"{len(judged) - len(missed)} of {len(judged)} bars are met"
        lines.append(Text(text, style="red" if missed else "green"))
    lines += [Text(f"  missed: {bar}", style="red") for bar in missed]
    return lines + [Text(f"  not judged, the peer is absent: {bar}") for bar in found if bar.met is None]


def bandwidth_table(result: Mapping[str, Any]) -> Table:
    """The best of a sweep for every access and size."""
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for point in result["points"]:
        key = point["access"], point["size"]
        if key not in best or point["gbps"] > best[key]["gbps"]:
            best[key] = point
    table = Table(title="Memory bandwidth: the best of every size", caption=machine(result["environment"]))
    for heading in ("access", "size", "GB/s", "blocks", "block size"):
        table.add_column(heading, justify="left" if heading == "access" else "right")
    for (access, size), point in best.items():
        table.add_row(
            access, _bytes(size), _number(point["gbps"]), str(point["blocks"]), f"{point['block_size'] / 1024:g} KiB"
        )
    return table
