"""What onepass is measured against. Every peer takes PyTorch's own layout, `(batch, nheads, seqlen, head_dim)`, so that
it runs as its users run it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention; lengths must be equal when causal (its alignment is top-left)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(q k^T) v as one writes it in PyTorch; `hidden` (seqlen_q, seqlen_k) is True where a key is not seen."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def sdpa_decode_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query over a cache of fewer KV heads, left to PyTorch: q (b, nheads_q, 1, d), k, v (b, nheads_kv, s, d)."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def sdpa_decode_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the query heads of one KV head folded into rows, which PyTorch's users do for speed."""
    batch, nheads_q, _, head_dim = q.shape
    folded = q.reshape(batch, k.shape[1], nheads_q // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)
