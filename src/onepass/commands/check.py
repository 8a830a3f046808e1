"""`onepass check`: every backend on this machine against the definition in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import click
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from onepass.bench import report
from onepass.core import cpu_library
from onepass.testing import numerics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Row:
    """The worst errors of one backend in one dtype over all cases of an operation, in units of the error budget."""

    op: str
    backend: str
    dtype: torch.dtype
    cases: int = 0
    worst: dict[str, float] = field(default_factory=dict)  # by tensor
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def add(self, case: str, comparisons: Sequence[numerics.Comparison]) -> None:
        self.cases += 1
        if max((c.units for c in comparisons), default=0.0) > max(self.worst.values(), default=-1.0):
            self.worst_case = case
        for comparison in comparisons:
            self.worst[comparison.tensor] = max(self.worst.get(comparison.tensor, 0.0), comparison.units)
            if not comparison.ok:
                self.failures.append(f"{self.op} on {self.backend}, {self.dtype}, case {case}: {comparison}")


def devices() -> list[str]:
    """Where kernels can run here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def measure(seed: int = 0, match: str = "", progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Run every case whose name contains `match` on every backend that can do it."""
    rows: dict[tuple[str, str, torch.dtype], Row] = {}
    for op, case in numerics.cases():
        if match not in case.name:
            continue
        progress(f"{op}: {case.name}")
        for device in devices():
            for dtype in DTYPES:
                generator = torch.Generator().manual_seed(seed)
                inputs = case.inputs(dtype, device, generator)
                for backend in case.backends(inputs):
                    row = rows.setdefault((op, backend, dtype), Row(op, backend, dtype))
                    row.add(case.name, numerics.compare_inputs(case, inputs, backend))
    return sorted(rows.values(), key=lambda row: (row.op, row.backend != "cpu", row.backend, DTYPES.index(row.dtype)))


def _cell(units: float | None) -> Text:
    if units is None:
        return Text("")
    if math.isinf(units):
        return Text("inf", style="bold red")
    return Text(f"{units:.2f}", style="green" if units <= 1.0 else "bold red")


def errors_table(rows: Sequence[Row]) -> Group:
    """For each operation a table: a row per backend and dtype, a column per output and gradient."""
    operations = list(dict.fromkeys(row.op for row in rows))
    return Group(
        "Worst error against fp64, in units of the error budget: at most 1 passes",
        *(_operation_table(op, [row for row in rows if row.op == op]) for op in operations),
        f"instruction set {cpu_library.isa()}; docs/numerics.md defines the budget",
    )


def _operation_table(op: str, rows: Sequence[Row]) -> Table:
    tensors = list(dict.fromkeys(tensor for row in rows for tensor in row.worst))
    table = Table(title=op, title_justify="left")
    for heading in ("backend", "dtype"):
        table.add_column(heading)
    table.add_column("cases", justify="right")
    for tensor in tensors:
        table.add_column(tensor, justify="right")
    table.add_column("worst case", overflow="fold")
    for row in rows:
        cells = [_cell(row.worst.get(tensor)) for tensor in tensors]
        facts = (row.backend, str(row.dtype).removeprefix("torch."), str(row.cases))
        table.add_row(*facts, *cells, row.worst_case)
    return table


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the random inputs.")
@click.option("--match", default="", metavar="TEXT", help="Only cases whose name contains this.")
def command(seed: int, match: str) -> None:
    """Compare every backend on this machine with fp64.

    Every operation's cases, in fp32, bf16 and fp16, forward and backward. Exits with 1 when an error is outside its
    budget.
    """
    console = report.console()
    with console.status("comparing with fp64") as status:
        rows = measure(seed, match, progress=status.update)
    if not rows:
        raise click.UsageError(f"no case's name contains {match!r}")
    console.print(errors_table(rows))
    failures = [failure for row in rows for failure in row.failures]
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False)
    if failures:
        raise click.exceptions.Exit(1)
