"""`onepass steps`: attention in four steps, checked, timed and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from onepass.lab import STEPS
from onepass.lab.bench import PYTORCH, Problem, failed, measure, save, title

_COUNT = click.IntRange(min=1)


@click.command()
@click.option("--seqlen", default=1024, show_default=True, type=_COUNT, help="Queries and keys.")
@click.option("--head-dim", default=32, show_default=True, type=_COUNT, help="Features of a head.")
@click.option("--heads", default=4, show_default=True, type=_COUNT, help="Heads.")
@click.option("-br", "--block-q", type=_COUNT, help="Queries of a tile.  [default: each step's own]")
@click.option("-bc", "--block-k", type=_COUNT, help="Keys of a tile.  [default: each step's own]")
@click.option("--threads", type=_COUNT, help="Threads of both sides.  [default: PyTorch's own]")
@click.option("--causal", is_flag=True, help="A query sees no key after itself.")
@click.option("--repeats", default=9, show_default=True, type=click.IntRange(min=2), help="Interleaved repeats.")
@click.option(
    "--out",
    default="onepass-steps/steps.svg",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The picture (.svg, .png, .pdf); its numbers go beside it as .json.",
)
def command(
    seqlen: int,
    head_dim: int,
    heads: int,
    block_q: int | None,
    block_k: int | None,
    threads: int | None,
    causal: bool,
    repeats: int,
    out: Path,
) -> None:
    """Attention from naive to flash: each step is checked against PyTorch, then timed beside it.

    Exits with 1 when a step is further from fp64 than its error budget. README.md in onepass/lab explains the steps.
    """
    problem = Problem(seqlen, head_dim, heads, causal, block_q, block_k, threads or torch.get_num_threads(), repeats)
    console = Console()
    with console.status("checking and timing"):
        result = measure(problem)
    console.print(steps_table(result))
    for path in save(result, out):
        console.print(f"written: {path}", highlight=False)
    if wrong := failed(result):
        console.print(f"[red]over the error budget: {', '.join(wrong)}[/red]")
        raise click.exceptions.Exit(1)


def steps_table(result: Mapping[str, Any]) -> Table:
    """Steps and PyTorch, a row each; ratios above 1 mean that the row is faster than that column."""
    table = Table(
        title=title(result),
        caption=f"measured FMA peak {result['peak_gflops']:.0f} GFLOP/s; memory beyond inputs and output (output: "
        f"{1e-6 * result['output_bytes']:.2f} MB); error against fp64, 1 is the budget",
    )
    table.add_column("step")
    for heading in ("tile", "ms", "memory MB", "GFLOP/s", "% of peak", "x SDPA", "x naive PyTorch", "error"):
        table.add_column(heading, justify="right")
    for name, row in result["contenders"].items():
        ours = name in STEPS
        ratios = [f"{row['ratios'][peer]['median']:.2f}" if peer in row["ratios"] else "-" for peer in PYTORCH]
        table.add_row(
            name,
            _tile(name, row),
            f"{1e3 * row['seconds']['median']:.3f}",
            f"{1e-6 * row['working_memory']:.3f}" if ours else "",
            f"{row['gflops']:.1f}",
            f"{row['percent_of_peak']:.1f}",
            *(ratios if ours else ["", ""]),
            f"{row['error_in_budgets']:.2f}" if ours else "",
        )
    return table


def _tile(name: str, row: Mapping[str, Any]) -> str:
    if name in ("blocked", "flash"):
        return f"{row['block_q']} x {row['block_k']}"
    return f"{row['block_q']} rows" if name == "fused" else ""
