"""Checks and times the four steps against PyTorch, and draws the picture. Needs the extras of 'onepass[cli]'."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from onepass.bench import environment, peers, timing
from onepass.bench.peak import fma_peak
from onepass.bench.run import spread, threads
from onepass.core.files import replace_file
from onepass.lab.steps import DEFAULT_BLOCKS, STEPS, attention_step, attention_step_and_memory
from onepass.testing import numerics

ROWS_CHECKED_AT_ONCE = 1024  # of the fp64 comparison, so that its own matrix of scores stays small
NAIVE_PYTORCH_LIMIT = 2**31  # bytes of scores past which PyTorch's naive attention is left out
SAMPLE_SECONDS = 0.01
PEAK_SECONDS = 0.01
PYTORCH = ("sdpa", "naive pytorch")


@dataclass(frozen=True)
class Problem:
    """What to run. block_q and block_k: None = each step's own; repeats: interleaved samples of every contender."""

    seqlen: int = 1024
    head_dim: int = 32
    heads: int = 4
    causal: bool = False
    block_q: int | None = None
    block_k: int | None = None
    num_threads: int = 2
    repeats: int = 9
    seed: int = 0

    @property
    def flops(self) -> float:
        """Of both products, counting visible keys only."""
        pairs = self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2
        return 4.0 * self.heads * pairs * self.head_dim


def measure(problem: Problem) -> dict[str, Any]:
    """Check every step, then time them and PyTorch interleaved; returns a plain dict, ready for JSON.

    A step's error is in units of the budget (`onepass.testing.numerics`): 1 or less passes.
    """
    torch.manual_seed(problem.seed)
    shape = (1, problem.seqlen, problem.heads, problem.head_dim)
    q, k, v = (torch.randn(shape) for _ in range(3))
    with threads(problem.num_threads):
        found = {step: _checked(problem, step, q, k, v) for step in STEPS}
        peaks: list[float] = []
        samples = timing.interleaved(
            _contenders(problem, q, k, v),
            problem.repeats,
            timing.WallClock(SAMPLE_SECONDS),
            between=lambda: peaks.append(fma_peak(torch.float32, problem.num_threads, PEAK_SECONDS)),
        )
        facts = environment.facts(problem.num_threads)
    peak = sorted(peaks)[len(peaks) // 2]
    for name, sample in samples.items():
        row = found.setdefault(name, {})
        row["seconds"] = spread(sample.seconds)
        row["gflops"] = 1e-9 * problem.flops / row["seconds"]["median"]
        row["percent_of_peak"] = 100.0 * row["gflops"] / peak
        row["ratios"] = {
            peer: spread([theirs / ours for theirs, ours in zip(samples[peer].seconds, sample.seconds, strict=True)])
            for peer in PYTORCH
            if peer in samples
        }
    return {
        "benchmark": "steps",
        "problem": asdict(problem),
        "flops": problem.flops,
        "output_bytes": q.numel() * q.element_size(),
        "peak_gflops": peak,
        "contenders": found,
        "samples": {name: sample.seconds for name, sample in samples.items()},
        "environment": facts,
    }


def failed(result: Mapping[str, Any]) -> list[str]:
    """The steps whose error is over the budget."""
    return [step for step in STEPS if not result["contenders"][step]["error_in_budgets"] <= 1.0]


def _options(problem: Problem, step: str) -> dict[str, Any]:
    return {"step": step, "block_q": problem.block_q, "block_k": problem.block_k, "causal": problem.causal}


def _contenders(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {
        step: functools.partial(attention_step, q, k, v, **_options(problem, step)) for step in STEPS
    }
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # PyTorch's own layout
    calls["sdpa"] = functools.partial(peers.sdpa, q, k, v, problem.causal)
    if 4 * problem.heads * problem.seqlen**2 <= NAIVE_PYTORCH_LIMIT:
        hidden = _hidden(0, problem.seqlen, problem.seqlen) if problem.causal else None
        calls["naive pytorch"] = functools.partial(peers.naive_attention, q, k, v, hidden)
    return calls


def _hidden(first: int, last: int, seqlen: int) -> Tensor:
    """True where a query of rows [first, last) must not see the key."""
    return torch.arange(seqlen) > torch.arange(first, last)[:, None]


def _checked(problem: Problem, step: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    out, working_memory = attention_step_and_memory(q, k, v, **_options(problem, step))
    own_q, own_k = DEFAULT_BLOCKS[step]
    return {
        "error_in_budgets": _error_in_budgets(problem, out, q, k, v),
        "working_memory": working_memory,
        "block_q": problem.block_q or own_q,
        "block_k": problem.block_k or own_k,
    }


def _error_in_budgets(problem: Problem, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    worst = 0.0
    for head in range(problem.heads):
        kh, vh = k[:, :, head], v[:, :, head]
        for first in range(0, problem.seqlen, ROWS_CHECKED_AT_ONCE):
            rows = slice(first, first + ROWS_CHECKED_AT_ONCE)
            qh = q[:, rows, head]
            hidden = _hidden(first, first + qh.shape[1], problem.seqlen) if problem.causal else None
            exact = peers.naive_attention(qh.double(), kh.double(), vh.double(), hidden)
            plain = peers.naive_attention(qh, kh, vh, hidden)
            worst = max(worst, numerics.error_in_budgets(out[:, rows, head], exact, plain))
    return worst


def save(result: Mapping[str, Any], picture: Path) -> list[Path]:
    """Write the picture (its suffix chooses .svg, .png, .pdf) and the JSON it is drawn from beside it.

    Raises ValueError for a suffix that cannot be drawn, OSError where the files cannot be written.
    """
    kinds = sorted(f".{kind}" for kind in Figure().canvas.get_supported_filetypes())
    if picture.suffix not in kinds:
        raise ValueError(f"cannot draw {picture}: its suffix must be one of {', '.join(kinds)}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    data = picture.with_suffix(".json")
    replace_file(data, (json.dumps(result, indent=1) + "\n").encode())
    draw(result, picture)
    return [picture, data]


def title(result: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    problem = result["problem"]
    return (
        f"{problem['heads']} heads, {problem['seqlen']} x {problem['seqlen']}, head_dim {problem['head_dim']}, fp32"
        f"{', causal' if problem['causal'] else ''}, {problem['num_threads']} threads, {result['environment']['isa']}"
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The picture of one result: time beside PyTorch's, working memory beside the size of the output."""
    found = result["contenders"]
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "onepass", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        time_axes, memory_axes = figure.subplots(1, 2)
        times = {step: 1e3 * found[step]["seconds"]["median"] for step in STEPS}
        _bars(time_axes, times, "ms", [f"{found[step]['percent_of_peak']:.0f} % of peak" for step in STEPS])
        lines = {peer: 1e3 * found[peer]["seconds"]["median"] for peer in PYTORCH if peer in found}
        _lines(time_axes, lines)
        time_axes.set_ylabel("time (ms)")
        memory = {step: 1e-6 * found[step]["working_memory"] for step in STEPS}
        _bars(memory_axes, memory, "MB", [""] * len(STEPS))
        _lines(memory_axes, {"the output itself": 1e-6 * result["output_bytes"]})
        memory_axes.set_yscale("log")
        memory_axes.set_ylabel("working memory (MB)")
        figure.suptitle(f"Attention in four steps: {title(result)}", fontsize=10)
        kind = path.suffix.removeprefix(".")
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    replace_file(path, buffer.getbuffer())


def _bars(axes: Axes, heights: Mapping[str, float], unit: str, notes: list[str]) -> None:
    bars = axes.bar(list(heights), list(heights.values()), color=("#b8c4d6", "#8aa5c8", "#5580b5", "#1f5fa8"))
    texts = [f"{height:.3g} {unit}\n{note}".strip() for height, note in zip(heights.values(), notes, strict=True)]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, texts, fontsize=8, padding=2, zorder=3, bbox=box)
    axes.margins(y=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Axes, heights: Mapping[str, float]) -> None:
    for (name, height), style in zip(heights.items(), ("--", ":"), strict=False):
        axes.axhline(height, color="#555555", linestyle=style, label=name, zorder=1)
    axes.legend(frameon=False)
