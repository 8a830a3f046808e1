"""The keys and values that a model has already computed, kept for the tokens to come."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every layer, ``capacity`` tokens at most.

    ``keys[layer]`` and ``values[layer]`` have the shape (batch, capacity, heads, head_dim) that
    :func:`onepass.attention_decode` takes. In memory each head's tokens lie one after the other.

    A model calls :meth:`advance` once for the tokens of a step, then :meth:`append` in every layer. ``length`` counts
    the tokens held, those of the step included; ``cache_seqlens`` says the same for each sequence, int32 (batch,).
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, size in (("batch", batch), ("capacity", capacity)):
            if size < 1:
                raise ValueError(f"a KV cache's {name} must be at least 1, got {size}")
        shape = (batch, heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(layers)]
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.batch, self.capacity = batch, capacity
        self.length = 0

    def advance(self, count: int) -> int:
        """Makes room for ``count`` more tokens and returns the position of the first of them."""
        start = self.length
        if start + count > self.capacity:
            raise ValueError(
                f"the KV cache holds {start} of {self.capacity} tokens: no room for {count} more; "
                "call reset() and start from the last tokens of the text"
            )
        self.length = start + count
        self.cache_seqlens.fill_(self.length)
        return start

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores a step's keys and values (batch, count, heads, head_dim) of one layer; ``advance`` came before."""
        count = k.shape[1]
        start = self.length - count
        self.keys[layer].narrow(1, start, count).copy_(k)
        self.values[layer].narrow(1, start, count).copy_(v)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of all that a layer holds: keys and values, (batch, length, heads, head_dim) each."""
        return self.keys[layer].narrow(1, 0, self.length), self.values[layer].narrow(1, 0, self.length)

    def reset(self) -> None:
        """Forgets everything; the memory is kept."""
        self.length = 0
        self.cache_seqlens.zero_()
