"""`onepass bench`: measure an operation, or writing text with a model, against PyTorch."""

from __future__ import annotations

from pathlib import Path

import click

from onepass.bench import environment, registry, report, run


def default_folders(device: str) -> tuple[Path, Path]:
    """Where results and pictures go: `benchmarks/` in a source checkout, else `onepass-bench/`."""
    root = Path("benchmarks") if Path("src/onepass").is_dir() else Path("onepass-bench")
    return root / "results" / device, root / "plots" / device


@click.command()
@click.argument("benchmark", required=False)
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Only this group; may be given several times.")
@click.option("--quick", is_flag=True, help="A few cases of each group, short samples.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1), help="Threads of both sides.")
@click.option("--repeats", default=9, show_default=True, type=click.IntRange(min=2), help="Interleaved repeats.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The JSON file; groups in it that are not measured now stay.",
)
@click.option("--plot", is_flag=True, help="Draw every group of the result as SVG.")
@click.option("--no-run", is_flag=True, help="Measure nothing: show (and --plot) the result that is there.")
@click.option("--check", is_flag=True, help="Exit with 1 when a bar is missed.")
@click.option("--list", "listing", is_flag=True, help="Name the benchmarks and their groups.")
def command(
    benchmark: str | None,
    groups: tuple[str, ...],
    quick: bool,
    threads: int,
    repeats: int,
    out: Path | None,
    plot: bool,
    no_run: bool,
    check: bool,
    listing: bool,
) -> None:
    """Measure BENCHMARK (attention, generation, ...) against PyTorch.

    Numbers are checked against fp64 before anything is timed. Without BENCHMARK the benchmarks are listed.
    """
    console = report.console()
    if listing or benchmark is None:
        for name in registry.modules():
            console.print(f"{name}: {', '.join(group.name for group in registry.find(name).groups)}", highlight=False)
        return
    found = registry.find(benchmark)
    results, plots = default_folders(environment.device_slug())
    out = out or results / f"{benchmark}{'-quick' if quick else ''}.json"
    if no_run:
        result = run.load(out)
    else:
        settings = run.Settings(
            num_threads=threads, repeats=repeats, sample_seconds=0.005 if quick else 0.02, quick=quick
        )
        with console.status("starting") as status:
            try:
                result = run.run(found, settings, out, groups, progress=status.update)
            except run.NumericsError as error:
                raise click.ClickException(str(error)) from error
    shown = run.only(result, groups)
    for table in report.tables(shown):
        console.print(table)
    for line in report.verdict(shown):
        console.print(line)
    if not no_run:
        console.print(f"written: {out}", highlight=False)
    if plot:
        from onepass.bench.plot import draw

        for path in draw(shown, plots, out.stem):
            console.print(f"drawn: {path}", highlight=False)
    if check and any(not bar.met for bar in report.bars(shown)):
        raise click.exceptions.Exit(1)
