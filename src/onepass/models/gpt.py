"""GPT, with nanoGPT's architecture, in one file.

Token and learned position embeddings are summed; then ``layers`` blocks, each ``x + attention(norm(x))`` followed by
``x + mlp(norm(x))`` (pre-LN: the residual stream itself is never normalised); a last norm; and a head that shares its
matrix with the token embedding. ``bias=False`` drops the bias of every linear layer and norm.

Shapes below: b batch, n tokens of this call, h heads, d head_dim, c width = h * d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, gelu, linear

from onepass.models.attention import AttentionChoice
from onepass.models.kv_cache import KVCache

__all__ = ["GPT", "PRESETS", "GPTCache", "GPTConfig", "preset"]

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. ``attention`` says how it runs at first (see ``onepass.models.attention``)."""

    vocab_size: int = 65
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0
    bias: bool = False
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")
        AttentionChoice(self.attention).check()

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


PRESETS = {
    "gpt-nano": GPTConfig(layers=3, heads=3, width=48),
    "gpt-micro": GPTConfig(layers=4, heads=4, width=128),
    "gpt-mini": GPTConfig(layers=6, heads=6, width=192),
    "shakes": GPTConfig(layers=4, heads=4, width=128, context=2048),
    "gpt2": GPTConfig(layers=12, heads=12, width=768, context=1024, vocab_size=50257, bias=True),
}


def preset(name: str, **changes: object) -> GPTConfig:
    """The named configuration with some fields changed: ``preset("gpt-nano", context=64)``."""
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


class Layers(NamedTuple):
    """What a block computes with, each a function of one tensor: the block's modules, or the same made `lean`."""

    norm1: Layer
    qkv: Layer
    proj: Layer
    norm2: Layer
    up: Layer
    down: Layer


class Block(nn.Module):
    """The parameters of one block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attention = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width, bias=bias), "proj": nn.Linear(width, width, bias=bias)}
        )
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(width, 4 * width, bias=bias), "proj": nn.Linear(4 * width, width, bias=bias)}
        )

    def layers(self) -> Layers:
        attention, mlp = self.attention, self.mlp
        return Layers(self.norm1, attention["qkv"], attention["proj"], self.norm2, mlp["up"], mlp["proj"])


class GPTCache(KVCache):
    """The keys and values of the tokens so far, and the layers that computed them, made `lean`."""

    def __init__(self, layers: list[Layers], norm: Layer, **sizes: Any) -> None:
        super().__init__(layers=len(layers), **sizes)
        self.layers = [Layers(*map(lean, block)) for block in layers]
        self.norm = lean(norm)


class GPT(nn.Module):
    """A GPT. ``attention`` names how its attention runs and may be set to another name at any time."""

    architecture = "gpt"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.choice = AttentionChoice(config.attention)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self._initialise()

    @property
    def attention(self) -> str:
        return self.choice.name

    @attention.setter
    def attention(self, name: str) -> None:
        self.set_attention(name)

    def set_attention(self, name: str, *, block_q: int | None = None, block_k: int | None = None) -> None:
        """Runs attention in another way from now on; ``block_q`` and ``block_k`` are for the lab steps alone."""
        choice = AttentionChoice(name, block_q, block_k)
        choice.check()
        self.choice = choice

    def forward(self, tokens: Tensor, *, cache: GPTCache | None = None, last_only: bool = False) -> Tensor:
        """Logits (b, n, vocab_size) for ``tokens``, int64 (b, n).

        With a ``cache`` the tokens continue what it holds, and it then holds them too. ``last_only`` gives the logits
        of the last token alone: (b, 1, vocab_size). Raises ``ValueError`` when the context has no room for them or
        the cache is of another batch size; the cache is then as it was.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (batch, tokens), got {tuple(tokens.shape)}")
        batch, n = tokens.shape
        start = 0 if cache is None else cache.length
        if start + n > self.config.context:
            raise ValueError(f"{start + n} tokens do not fit in the model's context of {self.config.context}")
        if cache is not None:
            if cache.batch != batch:
                raise ValueError(f"tokens have batch size {batch}, the cache {cache.batch}: take a new cache")
            cache.advance(n)
        dropout_p = self.config.dropout if self.training else 0.0
        token_weight = self.tokens.weight
        x = _dropped(embedding(tokens, token_weight) + self.positions.weight.narrow(0, start, n), dropout_p)
        blocks, norm = (self._layers(), self.norm) if cache is None else (cache.layers, cache.norm)
        for index, block in enumerate(blocks):
            x = self._block(x, block, index, cache, dropout_p)
        if last_only and n > 1:
            x = x[:, -1:]
        return linear(norm(x), token_weight)

    def _block(self, x: Tensor, block: Layers, index: int, cache: GPTCache | None, dropout_p: float) -> Tensor:
        """x (b, n, c) -> (b, n, c)."""
        b, n, c = x.shape
        heads = self.config.heads
        q, k, v = block.qkv(block.norm1(x)).view(b, n, 3, heads, c // heads).unbind(2)  # (b, n, h, d), not copied
        if cache is None:
            out = self.choice.full(q, k, v, dropout_p)
        else:
            cache.append(index, k, v)
            out = self.choice.cached(q, cache, index)
        x = x + _dropped(block.proj(out.reshape(b, n, c)), dropout_p)
        return x + _dropped(block.down(gelu(block.up(block.norm2(x)))), dropout_p)

    def _layers(self) -> list[Layers]:
        return [block.layers() for block in self.blocks]  # type: ignore[operator]

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> GPTCache:
        """An empty cache for this model, ``capacity`` tokens (default: the whole context).

        It holds on to the parameters that the model has now, as its keys and values do: take a new cache when you
        have replaced them. Raises ``ValueError`` when batch or capacity is below 1.
        """
        weight = self.tokens.weight
        return GPTCache(
            self._layers(),
            self.norm,
            batch=batch,
            capacity=self.config.context if capacity is None else capacity,
            heads=self.config.heads,
            head_dim=self.config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def parameter_count(self, *, positions: bool = False) -> int:
        """The number of parameters; the learned positions are counted only when asked for."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return count if positions else count - self.positions.weight.numel()

    def _initialise(self) -> None:
        """Normal, 0.02; layers that write to the residual stream are scaled down by the number of such layers."""
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=residual if name.endswith("proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def lean(module: Layer) -> Layer:
    """A plain function that computes what ``module`` does.

    Calling a module and looking up its parameters takes 3 us, and a token calls 24 of them: a third of its time.
    A module with hooks, or of another kind than GPT's own (a quantized layer, say), stays as it is.
    """
    if not isinstance(module, nn.Module) or module._forward_hooks or module._forward_pre_hooks:
        return module
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda x: linear(x, weight, bias)
    if type(module) is nn.LayerNorm:
        shape, scale, shift, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, scale, shift, eps)
    return module


def _dropped(x: Tensor, dropout_p: float) -> Tensor:
    return dropout(x, dropout_p) if dropout_p > 0.0 else x
