"""`onepass train gpt`: train a small GPT on any text."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from onepass.models.attention import ATTENTION_NAMES
from onepass.training.evaluation import export_model
from onepass.training.loop import Progress, TrainConfig, Trainer, saved_config, train
from onepass.training.metrics import draw_losses

DEFAULTS = TrainConfig()


class ConsoleProgress(Progress):
    """A bar with loss and tokens/s on a terminal; lines of text elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Bar | None = None

    def begin(self, trainer: Trainer) -> None:
        config = trainer.config
        count = trainer.model.parameter_count() / 1e6
        self.console.print(f"number of parameters: {count:.2f}M", highlight=False)
        self.console.print(
            f"text: {len(trainer.data.train):,} characters to train on, "
            f"{len(trainer.data.validation):,} to validate with, {len(trainer.data.tokenizer)} different; "
            f"{trainer.tokens_per_step:,} tokens a step",
            highlight=False,
        )
        if trainer.step:
            self.console.print(f"resumed at step {trainer.step}", highlight=False)
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("train", total=config.steps, completed=trainer.step, numbers="")
            self.bar.start()

    def steps(self, step: int, loss: float, tokens_per_second: float) -> None:
        if self.bar is not None:
            numbers = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            self.bar.update(self.task, completed=step, numbers=numbers)
        self.last = (loss, tokens_per_second)

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        line = f"step {step}: validation loss {loss:.4f}{' (best)' if best else ''}"
        if step and hasattr(self, "last"):
            line += f", training loss {self.last[0]:.4f}, {self.last[1]:,.0f} tokens/s"
        self.console.print(line, highlight=False)

    def sample(self, text: str) -> None:
        self.console.print(escape(text.strip("\n")), style="dim", highlight=False)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()


@click.group(help="Train a small model on any text.")
def command() -> None:
    pass


@command.command("gpt", context_settings={"show_default": True})
@click.option("--data", help="UTF-8 text file, or 'shakespeare' [default: the help text that Python itself carries].")
@click.option("--data-dir", default=DEFAULTS.data_dir, help="Where 'shakespeare' looks for, or stores, its text.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="runs/gpt", help="Folder of this run.")
@click.option("--resume", is_flag=True, help="Continue the run in --out, with its settings.")
@click.option("--export", type=click.Path(path_type=Path, dir_okay=False), help="Write the best model here in the end.")
@click.option("--device", default=DEFAULTS.device, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default=DEFAULTS.dtype, help="bf16: autocast.")
@click.option("--attention", type=click.Choice(ATTENTION_NAMES), default=DEFAULTS.attention, help="How attention runs.")
@click.option("--compile", is_flag=True, help="torch.compile the forward and backward.")
@click.option("--context", default=DEFAULTS.context, help="Characters that the model sees.")
@click.option("--layers", default=DEFAULTS.layers)
@click.option("--heads", default=DEFAULTS.heads)
@click.option("--width", default=DEFAULTS.width)
@click.option("--dropout", default=DEFAULTS.dropout)
@click.option("--bias/--no-bias", default=DEFAULTS.bias, help="Biases in linear layers and norms.")
@click.option("--batch", default=DEFAULTS.batch, help="Windows in one forward.")
@click.option("--grad-accum", default=DEFAULTS.grad_accum, help="Forwards in one step.")
@click.option("--steps", default=DEFAULTS.steps)
@click.option("--lr", default=DEFAULTS.lr, help="Highest learning rate.")
@click.option("--min-lr", default=DEFAULTS.min_lr, help="Last learning rate.")
@click.option("--warmup", default=DEFAULTS.warmup, help="Steps up to --lr.")
@click.option("--weight-decay", default=DEFAULTS.weight_decay)
@click.option("--grad-clip", default=DEFAULTS.grad_clip, help="Largest norm of the gradient; 0: none.")
@click.option("--eval-every", default=DEFAULTS.eval_every, help="Steps between validations, each with a checkpoint.")
@click.option("--eval-windows", default=DEFAULTS.eval_windows, help="Windows of the last tenth to validate with.")
@click.option("--sample", default=DEFAULTS.sample, help="Characters to write at each validation.")
@click.option("--seed", default=DEFAULTS.seed)
@click.pass_context
def gpt(ctx: click.Context, /, out: Path, resume: bool, export: Path | None, **settings: Any) -> None:
    """Train a GPT on the first nine tenths of a text and validate it on the rest.

    Ctrl-C and SIGTERM write a checkpoint first; --resume then continues to the very same losses.
    """
    console = Console()
    config = _resumed(ctx, out, settings) if resume else TrainConfig(**settings)
    if export is not None and not export.absolute().parent.is_dir():
        raise click.ClickException(f"--export {export}: there is no folder {export.absolute().parent}")
    progress = ConsoleProgress(console)
    result = train(config, out, resume=resume, progress=progress)
    _draw(out, console)
    if result.stopped_by is not None:
        name = result.stopped_by.name
        console.print(f"stopped by {name} after step {result.step}; saved in {out}: --resume continues")
        sys.exit(128 + result.stopped_by)
    console.print(f"best validation loss {result.best_loss:.4f} at step {result.best_step}; {out / 'best.safetensors'}")
    if export is not None:
        _export(config, out, export, console)


def _resumed(ctx: click.Context, out: Path, settings: dict[str, Any]) -> TrainConfig:
    """The run's own settings, with those that were given on the command line."""
    given = {
        name: value
        for name, value in settings.items()
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    return dataclasses.replace(saved_config(out), **given)


def _export(config: TrainConfig, out: Path, target: Path, console: Console) -> None:
    import torch

    from onepass.training.data import TextData, load_text

    data = TextData.of_text(load_text(config.data, Path(config.data_dir)), config.context)
    settings = dataclasses.asdict(config)
    for of_this_machine in ("data", "data_dir", "sample"):
        del settings[of_this_machine]
    record = export_model(out / "best.safetensors", target, data, torch.device(config.device), {"training": settings})
    for name, value in record.items():
        if isinstance(value, float):
            console.print(f"{name}: {value:.4f}", highlight=False)
    console.print(f"exported {target} ({target.stat().st_size / 1e6:.2f} MB)", highlight=False)


def _draw(out: Path, console: Console) -> None:
    try:
        draw_losses(out / "metrics.jsonl", out / "losses.png")
    except (ImportError, OSError) as error:  # a picture less, on a full disk, does not change how the run ended
        console.print(str(error), highlight=False)


if __name__ == "__main__":
    command()
