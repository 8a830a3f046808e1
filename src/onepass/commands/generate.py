"""`onepass generate`: write text with a stored model, as it streams."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from onepass.core.device import named
from onepass.generation import SampleConfig, generate
from onepass.models.attention import ATTENTION_NAMES
from onepass.models.weights import SHAKES, StoredModel, load_model

LENGTHS = {"shakes128": 128, "shakes256": 256, "shakes1024": 1024, "shakes2048": 2048}
DEFAULTS = SampleConfig()


@click.command(context_settings={"show_default": True})
@click.option(
    "-m", "--model", default="shakes256", help=f"{', '.join(LENGTHS)}: how many characters to write; or a model file."
)
@click.option("--tokens", type=int, help="Characters to write [default: those of the model's name; 256 for a file].")
@click.option("--prompt", help="The beginning of the text [default: a line feed].")
@click.option("--attention", type=click.Choice(ATTENTION_NAMES), default="auto", help="How attention runs.")
@click.option("-br", "--block-q", type=click.IntRange(min=1), help="Rows of a tile: the steps naive to flash.")
@click.option("-bc", "--block-k", type=click.IntRange(min=1), help="Columns of a tile: the steps naive to flash.")
@click.option("--no-cache", is_flag=True, help="Compute the whole text again for every character.")
@click.option("--temperature", default=DEFAULTS.temperature, help="0: always the likeliest character.")
@click.option("--top-k", type=int, default=DEFAULTS.top_k, help="Draw from this many of the likeliest; 0: from all.")
@click.option("--top-p", type=float, help="Draw from the likeliest that reach this probability together.")
@click.option("--seed", default=DEFAULTS.seed)
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
def command(
    model: str,
    tokens: int | None,
    prompt: str | None,
    attention: str,
    block_q: int | None,
    block_k: int | None,
    no_cache: bool,
    temperature: float,
    top_k: int,
    top_p: float | None,
    seed: int,
    device: str,
) -> None:
    """Write text with a model, as it streams."""
    if model not in LENGTHS and not Path(model).is_file():
        raise click.BadParameter(f"{model!r} is neither one of {', '.join(LENGTHS)} nor a model file", param_hint="-m")
    if prompt == "":
        raise click.BadParameter("the text needs a beginning of at least one character", param_hint="--prompt")
    config = SampleConfig(
        tokens=LENGTHS.get(model, DEFAULTS.tokens) if tokens is None else tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        seed=seed,
        no_cache=no_cache,
    )
    target = named(device)
    stored = load_model(SHAKES if model in LENGTHS else model, device=target)
    stored.model.set_attention(attention, block_q=block_q, block_k=block_k)
    prompt = stored.tokenizer.beginning if prompt is None else prompt
    beginning = stored.tokenizer.encode(prompt).to(target)
    click.echo(f"number of parameters: {stored.model.parameter_count() / 1e6:.2f}M")
    sys.stdout.write(prompt)
    began = time.perf_counter()
    count = sum(_write(piece) for piece in _pieces(stored, generate(stored.model, beginning, config)))
    seconds = time.perf_counter() - began
    speed = f"{count / seconds:,.0f} tokens/s ({_how(config, attention)})"
    click.echo(f"\n\n{count} characters in {seconds:.2f} s: {speed}")


def _pieces(stored: StoredModel, tokens: Iterator[int]) -> Iterator[str]:
    for token in tokens:
        yield stored.tokenizer.decode([token])


def _write(piece: str) -> int:
    sys.stdout.write(piece)
    sys.stdout.flush()
    return len(piece)


def _how(config: SampleConfig, attention: str) -> str:
    return f"attention {attention}, {'no cache' if config.no_cache else 'KV cache'}"


if __name__ == "__main__":
    command()
