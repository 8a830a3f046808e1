"""`onepass bench`: measure operations, writing text with a model, or the memory, on the GPU or the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

import onepass
from onepass.bench import bandwidth, environment, registry, report, run
from onepass.core.files import replace_file

ALL = "all"
BANDWIDTH = "bandwidth"

_DEVICE = click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to measure. [default: a GPU if any]")
_THREADS = click.option(
    "--threads", default=2, show_default=True, type=click.IntRange(min=1), help="Threads of both sides, on the CPU."
)
_OUT = click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The JSON file.")
_PLOT = click.option("--plot", is_flag=True, help="Draw the result as SVG.")
_NO_RUN = click.option("--no-run", is_flag=True, help="Measure nothing: show (and --plot) the result that is there.")


def default_folder(kind: str, slug: str) -> Path:
    """Where "results" or "plots" of a device go: in `benchmarks/` in a source checkout, else in `onepass-bench/`."""
    root = Path("benchmarks") if Path("src/onepass").is_dir() else Path("onepass-bench")
    return root / kind / slug


def chosen_device(name: str | None) -> str:
    """The device asked for, else "cuda" where there is a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} sees no GPU here")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


class Benchmarks(click.Group):
    """One command for each benchmark, all with the same options; `all` of them; and `bandwidth` with its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*registry.modules(), ALL, BANDWIDTH]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == BANDWIDTH:
            return bandwidth_command
        names = list(registry.modules()) if name == ALL else [name]
        if not set(names) <= set(registry.modules()):
            registry.find(name)  # raises, and names those there are
        return _command(name, names)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benchmarks"):
            formatter.write_dl([(name, _help(name)) for name in self.list_commands(ctx)])


def _help(name: str) -> str:
    special = {ALL: "Every benchmark but bandwidth.", BANDWIDTH: "How fast memory is read and copied; a sweep."}
    return special.get(name, f"Measure {name} against its peers.")


def _command(name: str, names: list[str]) -> click.Command:
    """Options are the same for every benchmark."""

    def callback(**options: Any) -> None:
        measure(names, **options)

    decorated: Callable[..., Any] = callback
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return click.command(name, help=f"{_help(name)} Numbers are checked against fp64 before anything is timed.")(
        decorated
    )


_OPTIONS = (
    click.option("--group", "groups", multiple=True, metavar="NAME", help="Only this group; may be given again."),
    _DEVICE,
    click.option("--quick", is_flag=True, help="A few cases of each group, short samples."),
    _THREADS,
    click.option("--repeats", default=9, show_default=True, type=click.IntRange(min=2), help="Interleaved repeats."),
    click.option(
        "--out",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The JSON file; groups in it that are not measured now stay.",
    ),
    _PLOT,
    _NO_RUN,
    click.option("--check", is_flag=True, help="Exit with 1 when a bar is missed."),
)


@click.group(cls=Benchmarks, invoke_without_command=True)
@click.option("--list", "listing", is_flag=True, help="Name the benchmarks and their groups on each device.")
@click.pass_context
def command(ctx: click.Context, listing: bool) -> None:
    """Measure operations (attention, norm, ...) and models (generation) against their peers.

    Without a benchmark they are listed.
    """
    if listing or ctx.invoked_subcommand is None:
        show_list(report.console())
        ctx.exit()


def show_list(console: Console) -> None:
    for name in registry.modules():
        benchmark = registry.find(name)
        for device in ("cpu", "cuda"):
            if groups := benchmark.on(device):
                console.print(f"{name} ({device}): {', '.join(group.name for group in groups)}", highlight=False)
    console.print(f"{BANDWIDTH} (cpu, cuda)", highlight=False)


def measure(
    names: list[str],
    groups: tuple[str, ...],
    device: str | None,
    quick: bool,
    threads: int,
    repeats: int,
    out: Path | None,
    plot: bool,
    no_run: bool,
    check: bool,
) -> None:
    """Measure and show benchmarks one after the other; one that fails does not keep the next from running."""
    console = report.console()
    if len(names) > 1 and (groups or out):
        raise ValueError("--group and --out are of one benchmark: name it")
    device = _device_of(names, groups, device)
    results = default_folder("results", environment.device_slug(device))
    settings = run.Settings(num_threads=threads, repeats=repeats, sample_seconds=0.005 if quick else 0.02, quick=quick)
    failed = []
    for name in names:
        found = registry.find(name)
        if not groups and not found.on(device):
            continue
        path = out or results / f"{name}{'-quick' if quick else ''}.json"
        try:
            result = run.load(path) if no_run else _measured(console, found, settings, path, groups, device)
        except (RuntimeError, onepass.UnsupportedError) as error:
            if len(names) == 1 and not isinstance(error, run.NumericsError):
                raise
            failed.append(f"{name}: {error}")
            if not path.exists():
                continue
            result = run.load(path)  # the groups before and after the one that failed
        shown = run.only(result, groups)
        _show(console, shown)
        if not no_run:
            console.print(f"written: {path}", highlight=False)
        if plot:
            _draw(console, shown, path.stem)
        if check and any(bar.met is False for bar in report.bars(shown)):
            failed.append(f"{name}: a bar is missed")
    if failed:
        raise click.ClickException("; ".join(failed))


def _device_of(names: list[str], groups: tuple[str, ...], device: str | None) -> str:
    """The device to measure on: that of the named groups, where some are named and no device is."""
    if device is None and groups:
        found = registry.find(names[0])
        return chosen_device(found.group(groups[0]).device)
    device = chosen_device(device)
    if len(names) == 1 and not registry.find(names[0]).on(device):
        return "cpu"
    return device


def _measured(
    console: Console,
    benchmark: registry.Benchmark,
    settings: run.Settings,
    path: Path,
    groups: tuple[str, ...],
    device: str,
) -> dict[str, Any]:
    with _progress(console) as progress:
        return run.run(benchmark, settings, path, groups, progress, device)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What is being measured: one line that changes on a terminal, lines on standard error elsewhere."""
    if not console.is_terminal:
        yield lambda text: click.echo(text, err=True)
        return
    with console.status("starting") as status:
        yield status.update


def _show(console: Console, result: dict[str, Any]) -> None:
    for table in report.tables(result):
        console.print(table)
    for line in report.verdict(result):
        console.print(line)


def _draw(console: Console, result: dict[str, Any], stem: str) -> None:
    """Pictures go to the folder of the device that the result is of, wherever they are drawn."""
    from onepass.bench.plot import draw

    for name, group in result["groups"].items():
        folder = default_folder("plots", group["environment"]["device"])
        for path in draw({**result, "groups": {name: group}}, folder, stem):
            console.print(f"drawn: {path}", highlight=False)


@click.command(BANDWIDTH)
@_DEVICE
@click.option("--size", "sizes", multiple=True, type=int, metavar="BYTES", help="Memory that is read or copied.")
@click.option(
    "--blocks",
    multiple=True,
    type=int,
    metavar="N",
    help="Threads on the CPU; on a GPU programs, 0: one for each block.",
)
@click.option("--block-size", "block_sizes", multiple=True, type=int, metavar="BYTES", help="What one takes at a time.")
@_THREADS
@_OUT
@_PLOT
@_NO_RUN
def bandwidth_command(
    device: str | None,
    sizes: tuple[int, ...],
    blocks: tuple[int, ...],
    block_sizes: tuple[int, ...],
    threads: int,
    out: Path | None,
    plot: bool,
    no_run: bool,
) -> None:
    """Measure how fast memory is read and copied, by kernels that do nothing else.

    Every combination of size, blocks and block size is measured; each may be given several times, and has a wide
    default. Reads and writes of a copy both count.
    """
    console = report.console()
    device = chosen_device(device)
    out = out or default_folder("results", environment.device_slug(device)) / f"{BANDWIDTH}.json"
    if no_run:
        result = load_bandwidth(out)
    else:
        default = bandwidth.default_sweep(device, threads)
        sweep = bandwidth.Sweep(
            device,
            default.accesses,
            sizes or default.sizes,
            blocks or default.blocks,
            block_sizes or tuple(size for size in default.block_sizes if size <= min(sizes or default.sizes)),
        )
        with _progress(console) as progress:
            result = bandwidth.measure(sweep, threads, progress if console.is_terminal else lambda text: None)
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (json.dumps(result, indent=1) + "\n").encode())
    console.print(report.bandwidth_table(result))
    if not no_run:
        console.print(f"written: {out}", highlight=False)
    if plot:
        from onepass.bench.plot import draw_bandwidth, save

        picture = default_folder("plots", result["environment"]["device"]) / f"{out.stem}.svg"
        save(draw_bandwidth(result), picture)
        console.print(f"drawn: {picture}", highlight=False)


def load_bandwidth(path: Path) -> dict[str, Any]:
    """A result of `onepass bench bandwidth`; ValueError says what is wrong with one that cannot be read."""
    if not path.exists():
        raise ValueError(f"there is no result {path} yet: run without --no-run to measure it")
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("benchmark") != BANDWIDTH:
        raise ValueError(f"{path} is not a result of onepass bench {BANDWIDTH}")
    return result
