"""Attention as a module: options once, tensors at each call."""

from typing import Any

import torch
from torch import Tensor

from onepass.ops.attention.api import attention
from onepass.ops.attention.api_varlen import attention_varlen


class Attention(torch.nn.Module):
    """`onepass.attention` with its options fixed. It has no weights: projections belong to the model around it.

        attend = onepass.nn.Attention(causal=True, dropout_p=0.1)
        out = attend(q, k, v)                                        # (batch, seqlen, heads, head_dim) each
        out = attend.packed(self.qkv(x), nheads_q=32, nheads_kv=8)   # straight from one fused projection

    Dropout acts in training mode only. The options are those of `onepass.attention`; what differs between calls
    (key_mask, attn_bias, alibi_slopes, attn_sink, rng_state, return_lse) is given to the call.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        causal_alignment: str = "bottom_right",
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        deterministic: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.causal_alignment = causal_alignment
        self.softmax_scale = softmax_scale
        self.window_size = window_size
        self.softcap = softcap
        self.dropout_p = dropout_p
        self.deterministic = deterministic
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """out, or (out, lse) with return_lse=True; shapes as in `onepass.attention`."""
        return attention(q, k, v, **self._fixed(), **options)

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, **options: Any
    ) -> Any:
        """The same on packed sequences: `onepass.attention_varlen`, whose max_seqlen_q and max_seqlen_k it needs."""
        return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **self._fixed(), **options)

    def _fixed(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "causal_alignment": self.causal_alignment,
            "softmax_scale": self.softmax_scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p if self.training else 0.0,
            "deterministic": self.deterministic,
            "backend": self.backend,
        }

    def packed(self, qkv: Tensor, *, nheads_q: int, nheads_kv: int, **options: Any) -> Any:
        """The same on one tensor (batch, seqlen, (nheads_q + 2 * nheads_kv) * head_dim), q's heads first, then k's,
        v's.

        q, k and v are read in place, as views. Returns out as (batch, seqlen, nheads_q * head_dim), ready for the
        output projection; with return_lse also lse.
        """
        heads = nheads_q + 2 * nheads_kv
        if qkv.dim() != 3 or heads < 1 or qkv.shape[-1] % heads:
            raise ValueError(
                f"qkv must be (batch, seqlen, (nheads_q + 2 * nheads_kv) * head_dim) with {heads} heads, "
                f"got {tuple(qkv.shape)}"
            )
        q, k, v = qkv.unflatten(-1, (heads, -1)).split((nheads_q, nheads_kv, nheads_kv), 2)
        result = self(q, k, v, **options)
        if isinstance(result, tuple):
            return result[0].flatten(-2), result[1]
        return result.flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"causal={self.causal}, causal_alignment={self.causal_alignment!r}, softmax_scale={self.softmax_scale}, "
            f"window_size={self.window_size}, softcap={self.softcap}, dropout_p={self.dropout_p}, "
            f"backend={self.backend!r}"
        )
