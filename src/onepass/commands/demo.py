"""`onepass demo`: everything in a few minutes, and a report to keep."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.rule import Rule

from onepass.bench import plot, registry, report, run
from onepass.commands import check, info
from onepass.commands.html_report import Report
from onepass.commands.train import ConsoleProgress
from onepass.core.files import replace_file
from onepass.generation import SampleConfig, generate
from onepass.models.weights import SHAKES, load_model
from onepass.training.data import TextData, load_text
from onepass.training.loop import TrainConfig, Trainer, train
from onepass.training.metrics import draw_losses

# Small enough that a minute on two cores takes the loss far down; the text is the one every Python carries.
TRAINING = TrainConfig(context=128, batch=16, eval_every=1_000_000, eval_windows=32, sample=200)
CALIBRATION_STEPS = 8


@contextmanager
def chapter(console: Console, page: Report, title: str, text: str = "") -> Iterator[None]:
    """A heading on the terminal and in the report, and the time it took."""
    console.print()
    console.print(Rule(f"[bold]{title}[/bold]", align="left"))
    page.section(title, text)
    began = time.perf_counter()
    yield
    console.print(f"[dim]({time.perf_counter() - began:.0f} s)[/dim]")


def show_machine(console: Console, page: Report) -> None:
    table = info.facts_table(info.gather())
    console.print(table)
    page.table(table, info.kernels_table())


def show_check(console: Console, page: Report, match: str) -> bool:
    with console.status("comparing with fp64") as status:
        rows = check.measure(match=match, progress=status.update)
    table = check.errors_table(rows)
    console.print(table)
    page.table(table)
    return all(row.passed for row in rows)


def show_text(console: Console, page: Report, tokens: int) -> None:
    """Write Shakespeare as it streams."""
    stored = load_model(SHAKES)
    console.print(f"number of parameters: {stored.model.parameter_count() / 1e6:.2f}M", highlight=False)
    config = SampleConfig(tokens=tokens)
    pieces = []
    began = time.perf_counter()
    for token in generate(stored.model, stored.tokenizer.encode("\n"), config):
        pieces.append(stored.tokenizer.decode([token]))
        sys.stdout.write(pieces[-1])
        sys.stdout.flush()
    seconds = time.perf_counter() - began
    speed = f"{tokens} characters in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s"
    console.print(f"\n\n{speed}", highlight=False)
    page.verbatim("".join(pieces).strip("\n"))
    page.verbatim(speed)


def steps_in(seconds: float, config: TrainConfig) -> int:
    """How many steps this machine makes in that time."""
    with torch.random.fork_rng(devices=[]):
        trainer = Trainer(config, TextData.of_text(load_text(config.data, Path(config.data_dir)), config.context))
        trainer.train_step()
        began = time.perf_counter()
        for _ in range(CALIBRATION_STEPS):
            trainer.train_step()
        return max(20, int(seconds * CALIBRATION_STEPS / (time.perf_counter() - began)))


def show_training(console: Console, page: Report, out: Path, seconds: float) -> None:
    """Train for about this long; the run's losses and best weights are kept in `out`."""
    steps = steps_in(seconds, TRAINING)
    config = dataclasses.replace(TRAINING, steps=steps, warmup=min(100, steps // 10), eval_every=-(-steps // 6))
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        result = train(config, run_folder, progress=ConsoleProgress(console))
        if result.stopped_by is not None:
            raise click.Abort
        for name in ("metrics.jsonl", "best.safetensors"):
            replace_file(out / name, (run_folder / name).read_bytes())
    draw_losses(out / "metrics.jsonl", out / "losses.png")
    speed = f"{steps} steps, {result.tokens_per_second:,.0f} tokens/s"
    text = f"{speed}; best validation loss {result.best_loss:.3f} nats per character"
    console.print(text, highlight=False)
    page.verbatim(text)
    page.picture(out / "losses.png", "Training and validation loss over the steps")


def show_bench(console: Console, page: Report, out: Path, threads: int, groups: tuple[str, ...]) -> bool:
    """A quick measurement against PyTorch; False when it found wrong numbers, which are not timed."""
    settings = run.Settings(num_threads=threads, repeats=7, sample_seconds=0.005, quick=True)
    path = out / "attention-quick.json"
    path.unlink(missing_ok=True)
    try:
        with console.status("starting") as status:
            result = run.run(registry.find("attention"), settings, path, groups, progress=status.update)
    except run.NumericsError as error:
        console.print(str(error), style="red", markup=False)
        page.verbatim(str(error))
        return False
    tables = report.tables(result)
    for table in tables:
        console.print(table)
    page.table(*tables)
    for picture in plot.draw(result, out, "attention-quick"):
        page.picture(picture, picture.stem)
    return True


@click.command(context_settings={"show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default="onepass-demo", help="Folder of the report."
)
@click.option("--threads", default=2, type=click.IntRange(min=1), help="Threads of PyTorch and onepass.")
@click.option("--tokens", default=1024, type=click.IntRange(min=1), help="Characters of Shakespeare to write.")
@click.option("--train-seconds", default=60.0, type=click.FloatRange(min=1.0), help="About how long to train.")
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Only these benchmark groups of attention.")
@click.option("--match", default="", metavar="TEXT", help="Check only cases whose name contains this.")
def command(out: Path, threads: int, tokens: int, train_seconds: float, groups: tuple[str, ...], match: str) -> None:
    """Show everything in a few minutes and write a report."""
    out.mkdir(parents=True, exist_ok=True)
    console, page = report.console(), Report("onepass on this machine")
    with run.threads(threads):
        with chapter(console, page, "This machine"):
            show_machine(console, page)
        with chapter(console, page, "Every backend against fp64", "Errors in units of the budget: at most 1 passes."):
            passed = show_check(console, page, match)
        with chapter(
            console,
            page,
            "A GPT writes Shakespeare",
            "0.8 million parameters, its attention by onepass, with a KV cache.",
        ):
            show_text(console, page, tokens)
        with chapter(
            console,
            page,
            "A GPT learns",
            "From nothing, on the help text that Python carries, through onepass's forward and backward.",
        ):
            show_training(console, page, out, train_seconds)
        with chapter(
            console, page, "Attention against PyTorch", "A quick look; `onepass bench attention` measures all cases."
        ):
            passed = show_bench(console, page, out, threads, groups) and passed
    page.write(out / "report.html")
    console.print(f"\n[bold]The report with all pictures: {out / 'report.html'}[/bold]", highlight=False)
    if not passed:
        raise click.exceptions.Exit(1)
