"""GPT, with nanoGPT's architecture, in one file.

Token and learned position embeddings are summed; then ``layers`` blocks, each ``x + attention(norm(x))`` followed by
``x + mlp(norm(x))`` (pre-LN: the residual stream itself is never normalised); a last norm; and a head that shares its
matrix with the token embedding. ``bias=False`` drops the bias of every linear layer and norm.

Shapes below: b batch, n tokens of this call, h heads, d head_dim, c width = h * d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from onepass.models.attention import AttentionChoice
from onepass.models.kv_cache import KVCache

__all__ = ["GPT", "PRESETS", "GPTConfig", "preset"]


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


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.heads = config.heads
        self.dropout = config.dropout

    def forward(self, x: Tensor, choice: AttentionChoice, cache: KVCache | None, layer: int) -> Tensor:
        """x (b, n, c) -> (b, n, c)."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).unbind(2)  # (b, n, h, d) views, not copies
        dropout_p = self.dropout if self.training else 0.0
        if cache is None:
            out = choice.full(q, k, v, dropout_p)
        else:
            cache.append(layer, k, v)
            out = choice.cached(q, cache, layer)
        return nn.functional.dropout(self.proj(out.reshape(b, n, c)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.proj = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.proj(nn.functional.gelu(self.up(x))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, choice: AttentionChoice, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attention(self.norm1(x), choice, cache, layer)
        return x + self.mlp(self.norm2(x))


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

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits (b, n, vocab_size) for ``tokens``, int64 (b, n).

        With a ``cache`` the tokens continue what it holds, and it then holds them too. ``last_only`` gives the logits
        of the last token alone: (b, 1, vocab_size). Raises ``ValueError`` when the context has no room for them.
        """
        n = tokens.shape[1]
        start = 0 if cache is None else cache.advance(n)
        if start + n > self.config.context:
            raise ValueError(f"{start + n} tokens do not fit in the model's context of {self.config.context}")
        x = self.tokens(tokens) + self.positions.weight[start : start + n]
        x = nn.functional.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.choice, cache, layer)
        if last_only:
            x = x[:, -1:]
        return nn.functional.linear(self.norm(x), self.tokens.weight)

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """An empty cache for this model, ``capacity`` tokens (default: the whole context)."""
        weight = self.tokens.weight
        return KVCache(
            layers=self.config.layers,
            batch=batch,
            capacity=capacity or self.config.context,
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
