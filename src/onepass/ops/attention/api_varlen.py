"""attention_varlen, the public function: attention on packed sequences and on paged keys."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from onepass.core import checks
from onepass.core.registry import Choice, choose, explains
from onepass.ops.attention import api, kernels, registration_varlen, spec_varlen

_LARGEST = 2**31 - 1  # lengths are int32

_HINTS = {
    **api.HINTS,
    "max_seqlen": "give max_seqlen_q= and max_seqlen_k=",
    "cache_seqlens": "use seqused_k=, the keys of each sequence",
    "seqlens_k": "use seqused_k=, the keys of each sequence",
}


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """`attention` on sequences of different lengths, packed one after the other without padding.

    Args:
        q: (total_q, nheads_q, head_dim), floating point. Any strides, read in place.
        k: (total_k, nheads_kv, head_dim), q's dtype; or with page_table (pages, page_size, nheads_kv, head_dim).
        v: the same with head_dim_v.
        cu_seqlens_q: int32 (batch + 1,): sequence b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1. It
            starts at 0, does not decrease, and ends at total_q; a sequence may be empty.
        cu_seqlens_k: the same for the keys, ending at total_k. With page_table it only gives their numbers, and may be
            None where seqused_k does.
        max_seqlen_q, max_seqlen_k: at least as long as the longest sequence.
        seqused_k: int32 (batch,): only the first seqused_k[b] keys of sequence b are used; the others are not read, and
            their gradients are 0.
        page_table: int32 (batch, max_pages), the pages of each sequence's keys in order (chunked prefill: k and v are
            the cache, the new keys already in it). Entries past the used keys may hold anything. Forward only.
        alibi_slopes: fp32 (nheads_q,) or (batch, nheads_q).
        attn_bias: broadcastable to (batch, nheads_q, max_seqlen_q, max_seqlen_k): [b, h, i, j] is of query i and key j
            of sequence b; differentiable.
        key_mask: bool (total_k,), True = seen; not with page_table.
        causal, causal_alignment, softmax_scale, window_size, softcap, attn_sink, dropout_p, generator, rng_state,
            deterministic, backend: as in `attention`, for each sequence by itself: shift is the keys that it uses less
            its queries (0 with causal_alignment="top_left"), dropout counts i and j inside the sequence.
        return_lse: also return lse.

    Returns:
        out (total_q, nheads_q, head_dim_v) in q's dtype, contiguous; with return_lse the pair of out and lse
        (nheads_q, total_q), fp32, natural log, differentiable. Rows without keys are as in `attention`.

    Raises:
        ValueError: shapes, devices or options contradict. TypeError: a wrong dtype or type.
        onepass.UnsupportedError: no backend can do this call; the message lists every backend's reasons.
        NotImplementedError: in a backward, with page_table.

    What the tensors of lengths and pages hold is checked where it can be read without waiting for a device, on the CPU
    (ValueError). On a GPU wrong numbers give wrong results, and nothing outside of the tensors is read or written:
    lengths are cut to what is there and to max_seqlen, rows past that are not written, and a used page that does not
    exist makes NaN.
    """
    if unknown:
        raise checks.unknown_argument(attention_varlen, next(iter(unknown)), _HINTS)
    try:
        call = _canonical(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_k,
            page_table,
            causal=causal,
            causal_alignment=causal_alignment,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            attn_bias=attn_bias,
            attn_sink=attn_sink,
            key_mask=key_mask,
            dropout_p=dropout_p,
            generator=generator,
            rng_state=rng_state,
            deterministic=deterministic,
            backend=backend,
        )
        out, lse = registration_varlen.attended(*call)
    except RuntimeError:
        api.require_strided(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_k=seqused_k,
            page_table=page_table,
            attn_bias=attn_bias,
            alibi_slopes=alibi_slopes,
            attn_sink=attn_sink,
            key_mask=key_mask,
            rng_state=rng_state,
        )
        raise
    return (out, lse) if return_lse else out


def _canonical(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """The arguments of the operation attention_varlen_fwd."""
    checks.require_tensor("cu_seqlens_q", cu_seqlens_q)
    api.require_tensors(cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, page_table=page_table)
    longest = _length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_k", max_seqlen_k)
    call = api.canonical(q, k, v, **options)
    return (*call[:3], cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, *call[3:8], *longest, *call[8:])


def _length(name: str, size: Any) -> Any:
    if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int, got {size!r}")
    return _LARGEST if isinstance(size, int) and size > _LARGEST else size


# What `explain` asks.


@explains("attention_varlen")
def _explain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> list[Choice]:
    options.pop("return_lse", None)
    if unknown := options.keys() - checks.options_of(attention_varlen):
        raise checks.unknown_argument(attention_varlen, min(unknown), _HINTS)
    api.require_strided(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)
    call = _canonical(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    arguments, backend = call[:14] + call[15:-1], call[-1]  # all but softmax_scale
    choices = [choose(kernels.VARLEN_FORWARD, spec_varlen.varlen_facts(*arguments), backend)]
    differentiable = (*call[:3], call[7], call[9])  # q, k, v, attn_bias, attn_sink
    need_q, need_k, need_v, need_bias, need_sink = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in differentiable
    )
    needs = (need_q, need_k or need_v, need_bias, need_sink)
    if any(needs) and call[6] is None:
        arguments += needs
        choices.append(choose(kernels.VARLEN_BACKWARD, spec_varlen.varlen_facts(*arguments), backend))
    return choices
