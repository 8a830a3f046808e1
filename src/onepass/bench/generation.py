"""Benchmark of writing text: tokens per second of the shipped model, at several lengths of text, against the same model
and cache with SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from onepass.bench.registry import Benchmark, Case, Group, Prepared
from onepass.generation import SampleConfig, choose_token
from onepass.models import weights
from onepass.models.gpt import GPT
from onepass.testing import numerics

TOKENS = 16  # written in one timed piece
PROVIDERS = {"onepass-cpu": "cpu", "sdpa": "sdpa"}


def write_tokens(model: GPT, attention: str, prompt: torch.Tensor, position: int) -> Callable[[], torch.Tensor]:
    """A call that writes TOKENS tokens after `position` tokens of text and returns their logits; each call starts from
    there again.
    """
    config = SampleConfig()
    cache = model.new_cache()
    with torch.inference_mode():
        model.attention = attention
        model(prompt[None, :position], cache=cache, last_only=True)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        model.attention = attention
        cache.length = position
        generator = torch.Generator().manual_seed(config.seed)
        token = int(prompt[position])
        logits = []
        for _ in range(TOKENS):
            logits.append(model(torch.tensor([[token]]), cache=cache, last_only=True)[0, -1])
            token = choose_token(logits[-1], config, generator)
        return torch.stack(logits)

    return call


def prepare(position: int) -> Prepared:
    stored = weights.load_model(weights.SHAKES)
    model, context = stored.model, stored.model.config.context
    with torch.inference_mode():
        prompt = torch.randint(model.config.vocab_size, (context,))
    providers = {name: write_tokens(model, attention, prompt, position) for name, attention in PROVIDERS.items()}

    def errors() -> dict[str, float]:
        """Of the first token's logits: those after it depend on what was drawn."""
        first = {name: call()[:1] for name, call in providers.items()}
        text = prompt[None, : position + 1]
        with torch.inference_mode():
            model.attention = "reference"
            rounded = model(text, last_only=True)[0]
            exact = model.double()(text.clone(), last_only=True)[0]
            model.float()
        return {name: numerics.error_in_budgets(logits, exact, rounded) for name, logits in first.items()}

    return Prepared(providers, errors)


def case(position: int) -> Case:
    return Case(
        name=f"after {position} tokens",
        params={"position": position, "tokens": TOKENS},
        dtype="float32",
        prepare=partial(prepare, position),
        items=TOKENS,
        bars={"ratio": 1.2 if position >= 1900 else 1.0},
        quick=position in (100, 2000),
    )


BENCHMARK = Benchmark(
    "generation",
    (
        Group(
            "shakes2048",
            "Tokens per second of the shipped model with a KV cache",
            tuple(map(case, (100, 500, 1000, 1500, 2000))),
            axis="position",
            last_rate_bar=0.75,
        ),
    ),
)
