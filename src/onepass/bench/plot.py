"""Pictures of a benchmark's result, drawn only from its JSON: time, GFLOP/s or GB/s, percent of the measured roof, the
ratio to the best peer; memory where it was measured.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onepass.bench.report import PER_SECOND, best_ratio, machine, ours
from onepass.core.files import replace_file

COLOURS = ("#1f5fa8", "#e07b39", "#8c8c8c", "#5a9e6f", "#9067a7", "#c2a33a")  # ours first
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.hashsalt": "onepass",  # the same result gives the same file
    "svg.fonttype": "none",
}

Column = list[float | None]  # one number per case; None where a provider was not measured


class Drawing:
    """One group's cases on a common horizontal axis: a parameter (curves), or the cases themselves (bars)."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group
        self.cases: Sequence[Mapping[str, Any]] = group["cases"]
        self.providers = list(dict.fromkeys(provider for case in self.cases for provider in case["samples"]))
        self.axis: str = group["axis"]
        self.places = [float(case["params"][self.axis]) if self.axis else i for i, case in enumerate(self.cases)]
        self.counts_flops = any(case["flops"] for case in self.cases)

    def panels(self) -> list[Callable[[Axes], None]]:
        """What is drawn, from left to right."""
        chosen: list[Callable[[Axes], None]] = [self.time]
        if self.counts_flops:
            chosen.append(self.gflops)
        if self.has("percent_of_peak"):
            chosen.append(self.percent_of_peak)
        if self.has("gbps"):
            chosen.append(self.gbps)
        if self.has("percent_of_bandwidth"):
            chosen.append(self.percent_of_bandwidth)
        if any(case["items"] for case in self.cases):
            chosen.append(self.rate)
        if any("memory_bytes" in case for case in self.cases):
            chosen.append(self.memory)
        if any("peak_bytes" in case for case in self.cases):
            chosen.append(self.peak_memory)
        if any("ratios" in case["summary"] for case in self.cases):
            chosen.append(self.ratio)
        return chosen

    def has(self, what: str) -> bool:
        return any(what in case["summary"] for case in self.cases)

    def time(self, axes: Axes) -> None:
        seconds = self.summary("seconds")
        self.draw(axes, scaled(seconds, PER_SECOND[self.group["unit"]]), f"time, {self.group['unit']}")
        if self.counts_flops:
            axes.set_yscale("log")
        first = seconds[ours(self.cases[0])][0]
        if self.axis and self.counts_flops and first is not None:
            unit = PER_SECOND[self.group["unit"]]
            square = [first * unit * (place / self.places[0]) ** 2 for place in self.places]
            axes.plot(self.places, square, "k:", linewidth=1, label="grows as N²")

    def gflops(self, axes: Axes) -> None:
        self.draw(axes, self.summary("gflops"), "GFLOP/s")

    def percent_of_peak(self, axes: Axes) -> None:
        self.draw(axes, self.summary("percent_of_peak"), "% of measured FMA peak")
        axes.set_ylim(0, 105)

    def gbps(self, axes: Axes) -> None:
        self.draw(axes, self.summary("gbps"), "GB/s")

    def percent_of_bandwidth(self, axes: Axes) -> None:
        self.draw(axes, self.summary("percent_of_bandwidth"), "% of measured copy bandwidth")
        axes.axhline(100.0, color="black", linewidth=0.8)

    def rate(self, axes: Axes) -> None:
        self.draw(axes, self.summary("items_per_second"), "per second")
        axes.set_ylim(bottom=0)

    def memory(self, axes: Axes) -> None:
        self.draw(axes, scaled(self.bytes("memory_bytes"), 2.0**-20), "memory beyond inputs and outputs, MiB")
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(bottom=0)

    def peak_memory(self, axes: Axes) -> None:
        self.draw(axes, scaled(self.bytes("peak_bytes"), 2.0**-30), "peak memory above the inputs, GiB")

    def bytes(self, what: str) -> dict[str, Column]:
        return {p: [case.get(what, {}).get(p) for case in self.cases] for p in self.providers}

    def ratio(self, axes: Axes) -> None:
        """The median ratio to the best peer with its quartiles, and each case's bar where it has one."""
        compared = [(x, c) for x, c in zip(self.places, self.cases, strict=True) if "best_peer" in c["summary"]]
        ratios = [best_ratio(case) for _, case in compared]
        error = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        line = "o-" if self.axis else "o"
        axes.errorbar(
            [x for x, _ in compared], [r["median"] for r in ratios], error, fmt=line, color=COLOURS[0], capsize=2
        )
        bars = [(x, case["bars"]["ratio"]) for x, case in compared if "ratio" in case["bars"]]
        if bars:
            axes.plot([x for x, _ in bars], [y for _, y in bars], "_", color="#b03030", markersize=12, label="bar")
            axes.legend(fontsize=7, frameon=False)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel("best peer's time / ours")
        self.label_places(axes)

    def summary(self, what: str) -> dict[str, Column]:
        """A figure of every provider over the cases; of times their medians."""
        values: dict[str, Column] = {}
        for provider in self.providers:
            column = [case["summary"].get(what, {}).get(provider) for case in self.cases]
            values[provider] = [value["median"] if isinstance(value, dict) else value for value in column]
        return values

    def draw(self, axes: Axes, values: Mapping[str, Column], label: str) -> None:
        """A curve per provider, or bars side by side."""
        width = 0.8 / len(values)
        for number, (provider, column) in enumerate(values.items()):
            shown = [(x, y) for x, y in zip(self.places, column, strict=True) if y is not None]
            heights, colour = [y for _, y in shown], COLOURS[number % len(COLOURS)]
            if self.axis:
                axes.plot([x for x, _ in shown], heights, "o-", label=provider, color=colour)
            else:
                shift = (number - (len(values) - 1) / 2) * width
                axes.bar([x + shift for x, _ in shown], heights, width, label=provider, color=colour)
        axes.set_ylabel(label)
        self.label_places(axes)

    def label_places(self, axes: Axes) -> None:
        if not self.axis:
            axes.set_xticks(self.places, [case["name"] for case in self.cases], rotation=60, ha="right", fontsize=7)
            return
        axes.set_xlabel(self.axis)
        if self.counts_flops:
            axes.set_xscale("log", base=2)
        axes.set_xticks(self.places, [case["params"][self.axis] for case in self.cases], rotation=60, fontsize=7)


def scaled(values: Mapping[str, Column], factor: float) -> dict[str, Column]:
    return {name: [None if x is None else x * factor for x in column] for name, column in values.items()}


def draw_group(group: Mapping[str, Any]) -> Figure:
    """One figure with all panels of a group."""
    drawing = Drawing(group)
    panels = drawing.panels()
    width = max(3.6, 1.6 + 0.22 * len(drawing.cases))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * len(panels), 3.8), layout="tight")  # without pyplot: no global state
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            panel(axes)
        figure.suptitle(f"{group['title']}\n{machine(group['environment'])}", fontsize=9, x=0.01, ha="left")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="upper right", ncols=4, fontsize=8, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write one figure as SVG or PNG, by its name; whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        kind = path.suffix.removeprefix(".")
        figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    replace_file(path, buffer.getbuffer())


def draw_bandwidth(result: Mapping[str, Any]) -> Figure:
    """GB/s of a sweep along each of its axes, the others at their best; along blocks and block sizes on the largest
    memory.
    """
    largest = max(point["size"] for point in result["points"])
    axes_of = {"size": "size, bytes", "blocks": "blocks at work", "block_size": "size of a block, bytes"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(axes_of), 3.6), layout="tight")
        grid = figure.subplots(1, len(axes_of), squeeze=False)
        for axes, (axis, label) in zip(grid[0], axes_of.items(), strict=True):
            for number, access in enumerate(result["sweep"]["accesses"]):
                points = [p for p in result["points"] if p["access"] == access]
                points = points if axis == "size" else [p for p in points if p["size"] == largest]
                places = sorted({p[axis] for p in points})
                heights = [max(p["gbps"] for p in points if p[axis] == place) for place in places]
                axes.plot(places, heights, "o-", label=access, color=COLOURS[number])
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(label)
            axes.set_ylabel("GB/s")
        figure.suptitle(f"Memory bandwidth\n{machine(result['environment'])}", fontsize=9, x=0.01, ha="left")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="upper right", ncols=4, fontsize=8, frameon=False)
    return figure


def draw(result: Mapping[str, Any], folder: Path, stem: str, suffix: str = ".svg") -> list[Path]:
    """One picture per group, `folder/stem-group.svg`; returns the paths."""
    paths = []
    for name, group in result["groups"].items():
        paths.append(folder / f"{stem}-{name}{suffix}")
        save(draw_group(group), paths[-1])
    return paths
