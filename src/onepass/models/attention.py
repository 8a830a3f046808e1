"""The ways in which a model's causal attention can run, by name.

=============================  ======================================================================================
name                           runs
=============================  ======================================================================================
auto                           ``onepass.attention`` with the backend that the registry chooses
cpu, reference                 ``onepass.attention`` with that backend
sdpa                           PyTorch's ``scaled_dot_product_attention``
naive, blocked, fused, flash   a step of ``onepass.lab.attention_step``: forward only, fp32
=============================  ======================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass.models.kv_cache import KVCache

__all__ = ["ATTENTION_NAMES", "LAB_STEPS", "AttentionChoice"]

LAB_STEPS = ("naive", "blocked", "fused", "flash")
_OF_ONEPASS = ("auto", "cpu", "reference")
ATTENTION_NAMES = (*_OF_ONEPASS, "sdpa", *LAB_STEPS)


class AttentionChoice(NamedTuple):
    """How a model's attention runs: a name of ``ATTENTION_NAMES``; tile sizes for the lab steps (None: their own)."""

    name: str = "auto"
    block_q: int | None = None
    block_k: int | None = None

    def check(self) -> None:
        """Raises ``ValueError`` for a name that does not exist, or tile sizes where nothing has tiles."""
        if self.name not in ATTENTION_NAMES:
            raise ValueError(f"attention is {self.name!r}; expected one of {', '.join(ATTENTION_NAMES)}")
        if self.name not in LAB_STEPS and (self.block_q, self.block_k) != (None, None):
            raise ValueError(
                f"block_q and block_k set the tiles of the lab steps ({', '.join(LAB_STEPS)}); "
                f"attention {self.name!r} chooses its own"
            )

    def full(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Causal attention, aligned to the bottom-right corner.

        q (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, heads, head_dim); returns q's shape.
        """
        if self.name == "sdpa":
            return _sdpa(q, k, v, dropout_p)
        if self.name in LAB_STEPS:
            return self._lab_step(q, k, v, dropout_p)
        return onepass.attention(q, k, v, causal=True, dropout_p=dropout_p, backend=self._backend)

    def cached(self, q: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Attention of a step's queries (batch, count, heads, head_dim) over all that the layer holds, theirs too."""
        if q.shape[1] == 1 and self.name in _OF_ONEPASS:
            return onepass.attention_decode(
                q, cache.keys[layer], cache.values[layer], cache_seqlens=cache.cache_seqlens, backend=self._backend
            )
        return self.full(q, *cache.held(layer))

    def check_training(self, sample: Tensor, dropout_p: float) -> None:
        """Tries one forward and backward of this attention, so that a run that cannot work ends before it begins.

        ``sample`` (1, 1, heads, head_dim) has the dtype and device of the run's queries. Raises ``ValueError``: what
        this attention cannot do, and what to change.
        """
        q = sample.detach().requires_grad_()
        try:
            self.full(q, q, q, dropout_p).sum().backward()
        except onepass.UnsupportedError as error:
            raise ValueError(
                f"attention {self.name!r} cannot train this model: train with attention 'sdpa' or 'reference'\n{error}"
            ) from error

    @property
    def _backend(self) -> str | None:
        return None if self.name == "auto" else self.name

    def _lab_step(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(f"attention {self.name!r} has no backward; train with auto, cpu, reference or sdpa")
        if dropout_p > 0.0:
            raise ValueError(f"attention {self.name!r} has no dropout; got dropout {dropout_p}")
        from onepass.lab import attention_step

        return attention_step(q, k, v, step=self.name, block_q=self.block_q, block_k=self.block_k, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    mask = None
    if 1 < seqlen_q < seqlen_k:  # is_causal would align to the top-left corner
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=seqlen_q == seqlen_k and seqlen_q > 1,
    )
    return out.transpose(1, 2)
