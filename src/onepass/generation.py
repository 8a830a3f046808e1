"""Writing text, one token at a time, with any model that has a KV cache.

When the context is full, the last half of it becomes the beginning of a new one: the cache is filled again from those
tokens and writing goes on. A cached and an uncached run slide at the same token, so they see the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onepass.models.kv_cache import KVCache

_FP32 = torch.finfo(torch.float32)

__all__ = ["CachedModel", "SampleConfig", "choose_token", "generate"]


class ContextConfig(Protocol):
    """A model's configuration, as far as writing needs it."""

    @property
    def context(self) -> int: ...


class CachedModel(Protocol):
    """What a model must offer: its context, a cache, and logits (batch, 1, vocab_size) of the last token."""

    @property
    def config(self) -> ContextConfig: ...

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache: ...

    def __call__(self, tokens: Tensor, *, cache: KVCache | None = None, last_only: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class SampleConfig:
    """How tokens are drawn.

    ``temperature`` divides the logits (0: always the likeliest token); ``top_k`` keeps that many of the likeliest;
    ``top_p`` keeps the fewest of them that reach this probability together; None: keep all. The same ``seed`` draws the
    same text. ``no_cache`` computes the whole context again for every token.
    """

    tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    seed: int = 1337
    no_cache: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"tokens is {self.tokens}; expected at least 0")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected a finite number, 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected at least 1, or None for all")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; expected 0 < top_p <= 1, or None for all")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; expected a number of 64 bits, -2**63 to 2**63 - 1")


def generate(model: CachedModel, prompt: Tensor, config: SampleConfig | None = None) -> Iterator[int]:
    """Yields ``config.tokens`` tokens that continue ``prompt``, each as soon as it is drawn.

    ``prompt`` is int64 (length,) on the model's device, at least one token; of a prompt longer than the context
    the last ``context`` tokens are read. The model should be in ``eval`` mode. The global random state is not used.
    """
    config = config or SampleConfig()
    if prompt.ndim != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt has the shape {tuple(prompt.shape)}; expected (length,) with at least one token")
    return _generate(model, prompt, config)


def _generate(model: CachedModel, prompt: Tensor, config: SampleConfig) -> Iterator[int]:
    context = model.config.context
    generator = torch.Generator().manual_seed(config.seed)
    cache = None if config.no_cache else model.new_cache(1, min(context, prompt.numel() + config.tokens))
    window = prompt[-context:].tolist()  # the text that the model sees
    unread = window  # the end of it that the cache has not seen
    for _ in range(config.tokens):
        tokens = torch.tensor([window if cache is None else unread], device=prompt.device)
        token = choose_token(_last_logits(model, tokens, cache), config, generator)
        yield token
        if len(window) < context:
            window.append(token)
            unread = [token]
        else:
            window = unread = [*window[context - context // 2 :], token]
            if cache is not None:
                cache.reset()


@torch.inference_mode()
def _last_logits(model: CachedModel, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """fp32 logits (vocab_size,) on the CPU, where the drawing is done: the same on every device."""
    return model(tokens, cache=cache, last_only=True)[0, -1].float().cpu()


@torch.inference_mode()
def choose_token(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """Draws a token from ``logits`` (vocab_size,), fp32 on the CPU, as ``config`` says.

    Raises ``ValueError`` when the logits hold NaN or nothing finite: such a model has no next token.
    """
    if config.temperature == 0.0:
        _require_finite(logits)
        return int(logits.argmax())
    temperature = min(max(config.temperature, _FP32.tiny), _FP32.max)
    cumulative = _cumulative(logits / temperature, config)
    total = float(cumulative[-1])
    if math.isnan(total):  # from the model, or from dividing by a tiny temperature
        _require_finite(logits)
        cumulative = _cumulative((logits - logits.max()) / temperature, config)  # at most 0, and 0 somewhere
        total = float(cumulative[-1])
    # The token at which the cumulative probability passes a uniform number: a third of torch.multinomial's time. In
    # fp64, a uniform number of 24 bits is below 1 by more than rounding: a token of probability 0 is never drawn.
    uniform = float(torch.rand(1, generator=generator))
    return int(torch.searchsorted(cumulative, uniform * total, right=True))


def _require_finite(logits: Tensor) -> None:
    if not math.isfinite(float(logits.max())):  # NaN when any of them is
        raise ValueError("the model's logits are not finite: its weights or its attention gave NaN or infinity")


def _cumulative(logits: Tensor, config: SampleConfig) -> Tensor:
    """Cumulative probabilities, fp64, with 0 for what top_k and top_p leave out; NaN when the logits are not finite."""
    if config.top_k is not None and config.top_k < logits.numel():
        smallest_kept = logits.topk(config.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    probabilities = logits.softmax(0)
    if config.top_p is not None and config.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True, stable=True)
        likelier = ordered.cumsum(0) - ordered  # what the likelier tokens reach without this one
        probabilities[order[likelier >= config.top_p]] = 0.0
    return probabilities.cumsum(0, dtype=torch.float64)
