"""The definition of attention_varlen: `reference.py` on one sequence after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.ops.attention import reference
from onepass.ops.attention.spec import lse_dtype
from onepass.ops.attention.spec_varlen import check_varlen_contents


@dataclass(frozen=True)
class Sequences:
    """What of a call's tensors belongs to which sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None
    page_table: Tensor | None
    attn_bias: Tensor | None
    alibi_slopes: Tensor | None
    attn_sink: Tensor | None
    key_mask: Tensor | None
    rng_state: Tensor | None

    def __iter__(self) -> Iterator[tuple[int, slice, slice]]:
        """The index, the queries and the keys of each sequence; keys count from its first page where there are any."""
        first_q = self.cu_seqlens_q.tolist()
        used = None if self.seqused_k is None else self.seqused_k.tolist()
        first_k = None if self.cu_seqlens_k is None else self.cu_seqlens_k.tolist()
        for index in range(len(first_q) - 1):
            start = 0
            if first_k is not None:
                start = first_k[index]
                end = first_k[index + 1]
            if used is not None:
                end = start + used[index]
            if self.page_table is not None:
                start, end = 0, end - start
            yield index, slice(first_q[index], first_q[index + 1]), slice(start, end)

    def keys(self, x: Tensor, index: int, keys: slice) -> Tensor:
        """k or v of a sequence, (1, seqlen_k, nheads_kv, d)."""
        if self.page_table is None:
            return x[keys].unsqueeze(0)
        page_size = x.shape[1]
        pages = -(-keys.stop // page_size) if page_size else 0
        return x[self.page_table[index, :pages].long()].flatten(0, 1)[keys].unsqueeze(0)

    def arguments(self, index: int, queries: slice, keys: slice) -> tuple[Any, ...]:
        """q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask and rng_state of attention on a sequence.

        The bias and the sink are as wide as sums run in, so that their gradients are not rounded before they are added
        up.
        """
        slopes, sink = self.alibi_slopes, self.attn_sink
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[index]
        return (
            self.q[queries].unsqueeze(0),
            self.keys(self.k, index, keys),
            self.keys(self.v, index, keys),
            self.bias_of(self.attn_bias, index, queries, keys),
            slopes,
            None if sink is None else sink.to(lse_dtype(self.q.dtype)),
            None if self.key_mask is None else self.key_mask[keys].unsqueeze(0),
            self.rng_state,
        )

    def bias_of(self, bias: Tensor | None, index: int, queries: slice, keys: slice) -> Tensor | None:
        """The part of the bias, or of its gradient, that a sequence has."""
        if bias is None:
            return None
        row = slice(None) if bias.shape[2] == 1 else slice(queries.stop - queries.start)
        col = slice(None) if bias.shape[3] == 1 else slice(keys.stop - keys.start)
        part = bias[:1] if bias.shape[0] == 1 else bias[index : index + 1]
        return part[:, :, row, col].to(lse_dtype(self.q.dtype))  # a view of a gradient, which has this dtype


def forward(*call: Any) -> tuple[Tensor, Tensor]:
    """out (total_q, nheads_q, head_dim_v) and lse (nheads_q, total_q), for the arguments of attention_varlen_fwd."""
    sequences, options = Sequences(*call[:12]), call[14:]
    q, k, v = sequences.q, sequences.k, sequences.v
    check_varlen_contents(q, k, *call[3:7], *call[12:14])
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype), device=q.device)
    for index, queries, keys in sequences:
        if queries.start == queries.stop:
            continue
        part, part_lse = reference.forward(*sequences.arguments(index, queries, keys), *options, sequence=index)
        out[queries], lse[:, queries] = part[0], part_lse[0]
    return out, lse


def backward(*call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsink, for the arguments of attention_varlen_bwd; empty where not needed."""
    do, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k = call[:10]
    sequences = Sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, None, *call[10:15])
    (max_seqlen_q, max_seqlen_k), options = call[15:17], call[17:]
    check_varlen_contents(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, None, max_seqlen_q, max_seqlen_k)
    need_dq, need_dkv, need_dbias, need_dsink = options[-4:]
    wide = lse_dtype(q.dtype)
    # Zeros, for keys that are not used too.
    dq, dk, dv, dbias, dsink = (
        torch.zeros(of.shape if needed and of is not None else 0, dtype=dtype, device=q.device)
        for of, needed, dtype in (
            (q, need_dq, q.dtype),
            (k, need_dkv, q.dtype),
            (v, need_dkv, q.dtype),
            (sequences.attn_bias, need_dbias, wide),
            (sequences.attn_sink, need_dsink, wide),
        )
    )
    for index, queries, keys in sequences:
        if queries.start == queries.stop:
            continue
        q_part, k_part, v_part, *optional = sequences.arguments(index, queries, keys)
        parts = reference.backward(
            do[queries].unsqueeze(0),
            None if dlse is None else dlse[:, queries].unsqueeze(0),
            q_part,
            k_part,
            v_part,
            out[queries].unsqueeze(0),
            lse[:, queries].unsqueeze(0),
            *optional,
            *options,
            sequence=index,
        )
        if need_dq:
            dq[queries] = parts[0][0]
        if need_dkv:
            dk[keys], dv[keys] = parts[1][0], parts[2][0]
        if (bias := sequences.bias_of(dbias if need_dbias else None, index, queries, keys)) is not None:
            bias += parts[3]
        if need_dsink:
            dsink += parts[4]
    if sequences.attn_bias is not None:
        dbias = dbias.to(sequences.attn_bias.dtype)
    if sequences.attn_sink is not None:
        dsink = dsink.to(sequences.attn_sink.dtype)
    return dq, dk, dv, dbias, dsink
