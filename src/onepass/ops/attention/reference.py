"""The definition of attention in plain PyTorch, its backward written out; used only when asked for by name.

Scores and statistics are fp32 (fp64 for fp64 inputs). The operands of matrix products have the inputs' dtype, as on
matrix units, so in bf16 this is also the measure of what bf16 can reach. Every backward here needs only the inputs, out
and lse, so it may follow the forward of any backend.

    s   = mask(bias + alibi + softcap(scale q k^T))          p  = exp(s - lse), 0 for unseen keys and rows without keys
    lse = log(sum_j exp(s_j) + exp(sink))                    dp = (do v^T) z
    out = (p z) v,  z = dropout's keep / (1 - p)             ds = p (dp - delta),  delta = rowsum(do out) - dlse

Keys that no query can see (key_mask, past cache_seqlens) are never read: they may hold NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from onepass.core import kv_formats
from onepass.core.torch_compat import without_autocast
from onepass.ops.attention.spec import check_cache_contents, lse_dtype

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

Shift = int | Tensor  # seqlen_k - seqlen_q or 0; a (batch, 1, 1, 1) tensor where it differs between sequences


class _Scores(NamedTuple):
    values: Tensor  # (batch, nheads_q, seqlen_q, seqlen_k), -inf where unseen
    softcap_slope: Tensor | None  # d capped / d uncapped


@without_autocast()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    key_mask: Tensor | None,
    rng_state: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    *,
    sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, nheads_q, head_dim_v) and lse (batch, nheads_q, seqlen_q).

    sequence: what dropout counts as the first of the batch.
    """
    k, v = _hide(k, key_mask), _hide(v, key_mask)
    shift = k.shape[1] - q.shape[1] if bottom_right else 0
    scores = _scores(
        q, k, attn_bias, alibi_slopes, key_mask, softmax_scale, window_left, window_right, shift, softcap
    ).values
    lse = _log_sum_exp(scores, attn_sink)
    weights = _probabilities(scores, lse)
    if dropout_p != 0.0:
        weights = weights * _dropout_factor(rng_state, dropout_p, weights, sequence)
    out = _round(weights, q.dtype) @ _per_query_head(v, q.shape[2])
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.to(lse_dtype(q.dtype))


@without_autocast()
def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    key_mask: Tensor | None,
    rng_state: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    need_dq: bool,
    need_dkv: bool,
    need_dbias: bool,
    need_dsink: bool,
    *,
    sequence: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsink, contiguous in the inputs' shapes and dtypes; empty where not needed."""
    k, v = _hide(k, key_mask), _hide(v, key_mask)
    nheads_q, nheads_kv = q.shape[2], k.shape[2]
    shift = k.shape[1] - q.shape[1] if bottom_right else 0
    scores, softcap_slope = _scores(
        q, k, attn_bias, alibi_slopes, key_mask, softmax_scale, window_left, window_right, shift, softcap
    )
    lse = lse.to(scores.dtype)
    p = _probabilities(scores, lse)
    grad_out = _heads_first(do)
    dp = grad_out @ _per_query_head(v, nheads_q).transpose(-1, -2)
    weights = p
    if dropout_p != 0.0:
        factor = _dropout_factor(rng_state, dropout_p, p, sequence)
        weights, dp = p * factor, dp * factor
    delta = (grad_out * _heads_first(out)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = torch.where(scores == -torch.inf, 0.0, p * (dp - delta.unsqueeze(-1)))

    dq, dk, dv, dbias, dsink = (q.new_empty((0,)) for _ in range(5))
    if need_dbias and attn_bias is not None:
        dbias = _sum_to(ds, attn_bias)
    if need_dsink and attn_sink is not None:
        dsink = _sink_gradient(attn_sink, lse, delta)
    if softcap_slope is not None:
        ds = ds * softcap_slope
    ds = _round(ds, q.dtype)
    if need_dq:
        dq = _like((ds @ _per_query_head(k, nheads_q)) * softmax_scale, q)
    if need_dkv:
        dk = _like(_sum_groups(ds.transpose(-1, -2) @ _heads_first(q), nheads_kv) * softmax_scale, k)
        dv = _like(_sum_groups(_round(weights, q.dtype).transpose(-1, -2) @ grad_out, nheads_kv), v)
    return dq, dk, dv, dbias, dsink


@without_autocast()
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    k_scale_shift: Tensor | None,
    v_scale_shift: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, nheads_q, head_dim_v) and lse (batch, nheads_q, seqlen_q), which is empty if not needed."""
    check_cache_contents(k_cache, cache_seqlens, page_table)
    k, v = k_cache, v_cache
    if k_scale_shift is not None and v_scale_shift is not None:
        k = kv_formats.dequantize_int4(k_cache, k_scale_shift, lse_dtype(q.dtype))
        v = kv_formats.dequantize_int4(v_cache, v_scale_shift, lse_dtype(q.dtype))
    if page_table is not None and cache_seqlens is not None:
        k, v = _gather_pages(k, page_table, cache_seqlens), _gather_pages(v, page_table, cache_seqlens)
    stored: Tensor | None = None
    shift: Shift = k.shape[1] - q.shape[1]
    if cache_seqlens is not None:
        stored = torch.arange(k.shape[1], device=k.device) < cache_seqlens.unsqueeze(1)
        shift = (cache_seqlens.long() - q.shape[1]).view(-1, 1, 1, 1)
    k, v = _descaled(k, k_descale, q), _descaled(v, v_descale, q)
    k, v = _hide(k, stored), _hide(v, stored)
    scores = _scores(q, k, None, alibi_slopes, stored, softmax_scale, window_left, window_right, shift, softcap).values
    lse = _log_sum_exp(scores, attn_sink)
    out = _round(_probabilities(scores, lse), q.dtype) @ _per_query_head(v, q.shape[2])
    return out.transpose(1, 2).to(q.dtype).contiguous(), (lse if need_lse else lse.new_empty(0)).to(lse_dtype(q.dtype))


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The result over all keys from results over disjoint parts of them, stacked along the first dimension."""
    lse = torch.logsumexp(lses, 0)
    weights = _part_weights(lses, lse)
    parts = torch.where(weights == 0, 0.0, outs.to(weights.dtype))
    return (weights * parts).sum(0).to(outs.dtype).contiguous(), lse.contiguous()


def merge_backward(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """douts and dlses: weight * do, and weight * (do . (outs - out) + dlse)."""
    weights = _part_weights(lses, lse)
    grad = do.to(weights.dtype)
    douts = (weights * grad).to(outs.dtype).contiguous()
    unweighted = (torch.where(weights == 0, 0.0, grad * (outs.to(weights.dtype) - out.to(weights.dtype)))).sum(-1)
    unweighted = unweighted.transpose(-1, -2)
    if dlse is not None:
        unweighted = unweighted + dlse
    weights = weights.squeeze(-1).transpose(-1, -2)
    return douts, torch.where(weights == 0, 0.0, weights * unweighted).contiguous()


def _part_weights(lses: Tensor, lse: Tensor) -> Tensor:
    """exp(lses - lse), 0 where no part saw a key, as (n, ..., seqlen, nheads, 1)."""
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp(lses - lse))
    return weights.transpose(-1, -2).unsqueeze(-1)


# Scores.


def _scores(
    q: Tensor,
    k: Tensor,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    shift: Shift,
    softcap: float,
) -> _Scores:
    """Scale, softcap, ALiBi, bias and masks, in this order."""
    scores = (_heads_first(q) @ _per_query_head(k, q.shape[2]).transpose(-1, -2)) * softmax_scale
    slope = None
    if softcap != 0.0:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
        slope = 1 - tanh * tanh
    distance = _distance(q.shape[1], k.shape[1], shift, q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if attn_bias is not None:
        scores = scores + attn_bias.to(scores.dtype)
    if window_left >= 0:
        scores = scores.masked_fill(distance < -window_left, -torch.inf)
    if window_right >= 0:
        scores = scores.masked_fill(distance > window_right, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return _Scores(scores, slope)


def _distance(seqlen_q: int, seqlen_k: int, shift: Shift, device: torch.device) -> Tensor:
    """j - (i + shift), (seqlen_q, seqlen_k) or (batch, 1, seqlen_q, seqlen_k)."""
    i = torch.arange(seqlen_q, device=device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=device)
    return j - i - shift


def _log_sum_exp(scores: Tensor, attn_sink: Tensor | None) -> Tensor:
    lse = torch.logsumexp(scores, -1)
    if attn_sink is not None:
        lse = torch.logaddexp(lse, attn_sink.to(scores.dtype).unsqueeze(-1))
    return lse


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); unseen keys are exactly 0, also in rows without keys (where both are -inf)."""
    return torch.where(scores == -torch.inf, 0.0, torch.exp(scores - lse.unsqueeze(-1)))


def _sink_gradient(attn_sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink has probability exp(sink - lse) and adds no value: d_sink = -sum over rows of that times delta."""
    sink = attn_sink.to(lse.dtype).unsqueeze(-1)
    probability = torch.where(lse == -torch.inf, 0.0, torch.exp(sink - lse))
    return -(probability * delta).sum((0, 2)).to(attn_sink.dtype)


# Layouts and dtypes.


def _heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, nheads, d) -> (batch, nheads, seqlen, d) in the dtype that sums run in."""
    return x.transpose(1, 2).to(lse_dtype(x.dtype))


def _per_query_head(x: Tensor, nheads_q: int) -> Tensor:
    """Heads first, each KV head repeated for the query heads that read it."""
    return _heads_first(x).repeat_interleave(nheads_q // x.shape[2], dim=1)


def _sum_groups(x: Tensor, nheads_kv: int) -> Tensor:
    """The gradient of `_per_query_head`'s repetition."""
    return x.unflatten(1, (nheads_kv, -1)).sum(2)


def _like(gradient: Tensor, of: Tensor) -> Tensor:
    """A heads-first gradient in the layout and dtype of the tensor that it belongs to."""
    return gradient.transpose(1, 2).to(of.dtype).contiguous()


def _sum_to(gradient: Tensor, of: Tensor) -> Tensor:
    """Sums the dimensions along which `of` was broadcast."""
    broadcast = [dim for dim in range(4) if of.shape[dim] == 1 and gradient.shape[dim] != 1]
    summed = gradient.sum(broadcast, keepdim=True) if broadcast else gradient
    return summed.to(of.dtype).contiguous()


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand of a matrix product: rounded to the inputs' dtype."""
    return x.to(dtype).to(x.dtype)


def _hide(x: Tensor, seen: Tensor | None) -> Tensor:
    """Zeros in the keys that nothing sees, (batch, seqlen_k) True = seen, whatever they held."""
    return (
        x if seen is None else torch.where(seen[:, :, None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    )


def _gather_pages(cache: Tensor, page_table: Tensor, cache_seqlens: Tensor) -> Tensor:
    """(batch, max_pages * page_size, nheads_kv, d); table entries past the stored keys are not looked at."""
    page_size = cache.shape[1]
    used = torch.arange(page_table.shape[1], device=cache.device) * page_size < cache_seqlens.unsqueeze(1)
    return cache[torch.where(used, page_table, 0).long()].flatten(1, 2)


def _descaled(cache: Tensor, descale: Tensor | None, q: Tensor) -> Tensor:
    """A cache as numbers: a quantised one is multiplied in fp32 by its scale per KV head."""
    if descale is None:
        return cache if cache.dtype == q.dtype else cache.to(torch.float32)
    scale = descale if descale.dim() == 2 else descale.unsqueeze(0)
    return cache.to(lse_dtype(q.dtype)) * scale[:, None, :, None]


# Dropout.


def _dropout_factor(rng_state: Tensor | None, dropout_p: float, weights: Tensor, sequence: int) -> Tensor:
    """keep / (1 - p) for every weight (batch, nheads_q, seqlen_q, seqlen_k)."""
    if dropout_p >= 1.0 or rng_state is None:
        return torch.zeros_like(weights)
    return dropout_keep(rng_state, dropout_p, weights.shape, sequence).to(weights.dtype) / (1.0 - dropout_p)


def dropout_keep(
    rng_state: Tensor, dropout_p: float, shape: tuple[int, ...] | torch.Size, first_batch: int = 0
) -> Tensor:
    """Which weights (batch, nheads_q, seqlen_q, seqlen_k) dropout keeps, as bool; the batch counts from `first_batch`.

    Element (b, h, i, j) is kept iff word j % 4 of Philox4x32-10(key = seed, counter = (offset, b * nheads_q + h, i, j
    // 4)) is at least p * 2**32.
    """
    batch, nheads_q, seqlen_q, seqlen_k = shape
    seed, offset = rng_state.unbind()
    head, row, column = (
        torch.arange(size, device=rng_state.device, dtype=torch.int64)
        for size in (batch * nheads_q, seqlen_q, (seqlen_k + 3) // 4)
    )
    head = head + first_batch * nheads_q
    counter = torch.broadcast_tensors(offset & _WORD, head.view(-1, 1, 1), row.view(-1, 1), column)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), -1)
    return (
        (words >= math.ceil(dropout_p * 2**32)).flatten(-2)[..., :seqlen_k].reshape(batch, nheads_q, seqlen_q, seqlen_k)
    )


def philox(counter: tuple[Tensor, ...] | list[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words for four counter words and two key words, all held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a 32 x 32 bit product; the int64 product wraps around, its bits are right."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
