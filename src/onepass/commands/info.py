"""`onepass info`: what this machine has, and which kernels it can run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click
import torch
from rich.table import Table

from onepass.bench import environment, report
from onepass.core import cpu_library
from onepass.core.support_table import support_tables


def gpus() -> list[str]:
    """Names of the GPUs that PyTorch can use."""
    return (
        [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )


def gather() -> dict[str, Any]:
    """Everything the command shows, as JSON can hold it."""
    problem = cpu_library.unavailable()
    found: dict[str, Any] = {"cpu_library_problem": problem} if problem else environment.facts(torch.get_num_threads())
    return found | {"gpus": gpus(), "torch": torch.__version__}


def facts_table(found: Mapping[str, Any]) -> Table:
    """The facts as two columns."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if problem := found.get("cpu_library_problem"):
        table.add_row("C++ kernels", f"[red]cannot run here:[/red] {problem}")
    else:
        clocks = ", ".join(f"{name} {value}" for name, value in found["clocks"].items())
        table.add_row("processor", f"{found['cpu']}, {found['cores']} cores" + (f" ({clocks})" if clocks else ""))
        table.add_row(
            "C++ kernels",
            f"{found['isa']} in use; this machine runs {', '.join(found['isas'])} (ONEPASS_CPU_ISA forces one)",
        )
        table.add_row("threads", f"{found['threads']} (torch.set_num_threads changes it)")
        table.add_row("system", f"{found['system']}, Python {found['python']}")
        table.add_row("onepass", found["onepass"] + (f", commit {found['commit'][:12]}" if found["commit"] else ""))
    table.add_row("PyTorch", found["torch"])
    table.add_row("GPUs", ", ".join(found["gpus"]) or "none that PyTorch can use")
    return table


def kernels_table() -> Table:
    """Features and the backends that have them here, `reference` aside; from the tables that choose the kernels."""
    supports = list(support_tables())
    table = Table(
        title="What runs here", title_justify="left", caption="`reference` does all of it when asked for by name"
    )
    table.add_column("")
    cells: dict[str, dict[str, str]] = {}
    for support in supports:
        table.add_column(support.title)
        kernels = [kernel for kernel in support.table.kernels if not kernel.by_name_only]
        for feature, spec in support.features().items():
            able = [kernel.backend for kernel in kernels if not kernel.unsupported(spec)]
            cells.setdefault(feature, {})[support.title] = ", ".join(able) or "-"
    for feature, row in cells.items():
        table.add_row(feature, *(row.get(support.title, "") for support in supports))
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def command(as_json: bool) -> None:
    """What this machine has, and which kernels it can run."""
    found = gather()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    console = report.console()
    console.print(facts_table(found), highlight=False)
    console.print()
    console.print(kernels_table())
