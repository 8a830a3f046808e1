"""Tables of a benchmark's result, and whether its bars are reached; everything is read from the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

TOLERANCE = 0.02  # a ratio's bar is met when its median is at least the bar minus this
BARS = ("ratio", "percent_of_peak", "seconds", "error_to_sdpa")
PER_SECOND = {"ms": 1e3, "us": 1e6}


class Bar(NamedTuple):
    """One thing to be reached, and what was measured."""

    group: str
    case: str
    what: str
    measured: float
    bar: float
    met: bool

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


def case_bars(group: str, case: Mapping[str, Any]) -> Iterator[Bar]:
    summary, mine = case["summary"], ours(case)
    for what, bar in case["bars"].items():
        if what == "ratio":
            measured = best_ratio(case)["median"]
            yield Bar(
                group, case["name"], f"ratio to {summary['best_peer']}", measured, bar, measured >= bar - TOLERANCE
            )
        elif what == "percent_of_peak":
            measured = summary["percent_of_peak"][mine]
            yield Bar(group, case["name"], "percent of FMA peak", measured, bar, measured >= bar)
        elif what == "seconds":
            measured = summary["seconds"][mine]["median"]
            yield Bar(group, case["name"], "seconds", measured, bar, measured <= bar)
        elif what == "error_to_sdpa":
            errors = case["error_in_budgets"]
            measured = errors[mine] / errors["sdpa"]
            yield Bar(group, case["name"], "error against fp64 over sdpa's", measured, bar, measured <= bar)
        else:
            raise ValueError(f"{group}, {case['name']}: there is no bar {what!r}; expected one of {', '.join(BARS)}")


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


def _number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def group_table(name: str, group: Mapping[str, Any]) -> Table:
    """One group: a row per case, with times of all providers, the ratio to the best peer and what the case counts."""
    cases: Sequence[Mapping[str, Any]] = group["cases"]
    providers = list(dict.fromkeys(provider for case in cases for provider in case["samples"]))
    has = {what: any(case.get(what) for case in cases) for what in ("flops", "items", "memory_bytes")}
    table = Table(
        title=f"{group['title']} ({name})", title_justify="left", caption=_caption(group), caption_justify="left"
    )
    table.add_column("case", no_wrap=True)
    for provider in providers:
        table.add_column(f"{provider}\n{group['unit']}", justify="right")
    table.add_column("ratio to best\n(quartiles)", justify="right")
    if has["flops"]:
        table.add_column("GFLOP/s\n(% of peak)", justify="right")
    if has["items"]:
        table.add_column("per second\nours / best peer", justify="right")
    if has["memory_bytes"]:
        table.add_column("extra memory\nours / sdpa", justify="right")
    table.add_column("error in\nbudgets", justify="right")
    for case in cases:
        table.add_row(*_cells(name, case, group, providers, has))
    return table


def _cells(
    name: str, case: Mapping[str, Any], group: Mapping[str, Any], providers: Sequence[str], has: Mapping[str, bool]
) -> Iterator[Text]:
    summary, mine = case["summary"], ours(case)
    yield Text(case["name"])
    for provider in providers:
        time = summary["seconds"].get(provider)
        yield Text(_number(time["median"] * PER_SECOND[group["unit"]]) if time else "-")
    met = all(bar.met for bar in case_bars(name, case))
    ratio = best_ratio(case)
    style = ("green" if met else "red") if case["bars"] else ""
    yield Text(f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})", style=style)
    if has["flops"]:
        yield Text(f"{_number(summary['gflops'][mine])} ({summary['percent_of_peak'][mine]:.0f} %)")
    if has["items"]:
        rates = summary["items_per_second"]
        yield Text(f"{_number(rates[mine])} / {_number(rates[summary['best_peer']])}")
    if has["memory_bytes"]:
        yield Text(" / ".join(_bytes(case["memory_bytes"][p]) for p in (mine, "sdpa") if p in case["memory_bytes"]))
    yield Text(f"{case['error_in_budgets'][mine]:.2f}")


def _caption(group: Mapping[str, Any]) -> str:
    facts, settings = group["environment"], group["settings"]
    several = len(group["cases"]) > 1 and group["geometric_mean"] is not None
    mean = f"geometric mean of the ratios {group['geometric_mean']:.2f}; " if several else ""
    return (
        f"{mean}{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{settings['repeats']} interleaved repeats{', quick' if settings['quick'] else ''}"
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """One table per group."""
    return [group_table(name, group) for name, group in result["groups"].items()]


def verdict(result: Mapping[str, Any]) -> list[Text]:
    """How many bars are met, and a line for each that is not."""
    found = bars(result)
    missed = [bar for bar in found if not bar.met]
    if not found:
        return []
    lines = [Text(f"{len(found) - len(missed)} of {len(found)} bars are met", style="red" if missed else "green")]
    return lines + [Text(f"  missed: {bar}", style="red") for bar in missed]
