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
    the tokens held, those of the step included.
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
        shape = (batch, heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(layers)]
        self.capacity = capacity
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
        return start

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a step's keys and values (batch, count, heads, head_dim) of one layer; ``advance`` came before.

        Returns views of all that the layer holds now: (batch, length, heads, head_dim) each.
        """
        keys, values, end = self.keys[layer], self.values[layer], self.length
        start = end - k.shape[1]
        keys[:, start:end] = k
        values[:, start:end] = v
        return keys[:, :end], values[:, :end]

    def reset(self) -> None:
        """Forgets everything; the memory is kept."""
        self.length = 0
