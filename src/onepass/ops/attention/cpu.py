"""The C++ kernels: packs a call into the argument structs of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import CACHE_CODES, CACHE_PLAIN, DTYPE_CODES
from onepass.ops.attention.spec import Sizes, check_cache_contents

_ABSENT = (0, 0, 0, 0, 0)
_NO_MASK = (0, 0, 0)
_NO_OPTIONS = (0.0, 0.0, *[0] * 14)
_NOT_PACKED = (0,) * 6
_NO_PAGES = (0,) * 6
_PLAIN_CACHES = (0,) * 20
_FAR = 1 << 40  # windows are clamped here, so that index arithmetic cannot overflow

# struct AttentionProblem, then the rest of each argument struct: q = int64_t or pointer, d = double.
_PROBLEM = "12qd3q2d14q"
_TENSOR = "5q"
_PACKED, _PAGES = "6q", "6q"
_FWD = struct.Struct(f"={_PROBLEM}{4 * _TENSOR}q{_PACKED}{_PAGES}")
_BWD = struct.Struct(f"={_PROBLEM}{5 * _TENSOR}2q{3 * _TENSOR}6q{_PACKED}")
_DECODE = struct.Struct(f"={_PROBLEM}{4 * _TENSOR}3q{_PAGES}20q")
_MERGE = struct.Struct("=11q")
_MERGE_BWD = struct.Struct("=15q")

_CPU = torch.device("cpu")


def forward_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    page_table: Tensor | None, attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None,
    key_mask: Tensor | None, rng_state: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float,
    window_left: int, window_right: int, bottom_right: bool, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (total_q, nheads_q, head_dim_v) and lse (nheads_q, total_q) of packed sequences, in one call of the kernel.

    k and v are (total_k, nheads_kv, head_dim), or (pages, page_size, nheads_kv, head_dim) with page_table. Raises
    IndexError for lengths or pages that do not fit.
    """
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=_CPU)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=_CPU)
    pages: tuple[int, ...] = _NO_PAGES
    if page_table is not None:
        pages = _page_table(page_table, k)
        seqused_k = seqused_k if cu_seqlens_k is None or seqused_k is not None else cu_seqlens_k.diff()
        cu_seqlens_k = None
    if cu_seqlens_q.shape[0] > 1:
        options = _score_options(attn_bias, alibi_slopes, attn_sink, rng_state, softcap, dropout_p)
        sizes = _packed_sizes(q, k, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
        mask = None if key_mask is None else key_mask.expand(sizes[0], -1)
        problem = _problem(q.dtype, sizes, mask, softmax_scale, window_left, window_right, False, options)
        lengths = [_int32(x) for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)]
        packed_tensor = _tensor if page_table is not None else _packed_tensor
        cpu_library.kernel("attention_fwd")(
            _FWD.pack(
                *problem, *_packed_tensor(q), *packed_tensor(k), *packed_tensor(v), *_packed_tensor(out),
                lse.data_ptr(), *_pointers(lengths), q.shape[0], k.shape[0], bottom_right, *pages,
            )
        )  # fmt: skip
    return out, lse


def backward_packed(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, attn_bias: Tensor | None,
    alibi_slopes: Tensor | None, attn_sink: Tensor | None, key_mask: Tensor | None, rng_state: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, window_left: int, window_right: int,
    bottom_right: bool, softcap: float, dropout_p: float, deterministic: bool, need_dq: bool, need_dkv: bool,
    need_dbias: bool, need_dsink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias and dsink of packed sequences; zeros for keys that are not used."""
    dq, dk, dv = (_zeros_like(x if need else None, q) for x, need in ((q, need_dq), (k, need_dkv), (v, need_dkv)))
    dbias = _zeros_like(attn_bias if need_dbias else None, q)
    dsink = _zeros_like(attn_sink if need_dsink else None, q)
    if q.numel() and cu_seqlens_q.shape[0] > 1:
        lse = lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        options = _score_options(attn_bias, alibi_slopes, attn_sink, rng_state, softcap, dropout_p)
        sizes = _packed_sizes(q, k, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
        mask = None if key_mask is None else key_mask.expand(sizes[0], -1)
        problem = _problem(q.dtype, sizes, mask, softmax_scale, window_left, window_right, False, options)
        lengths = [_int32(x) for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)]
        tensors = [value for x in (q, k, v, out, do) for value in _packed_tensor(x)]
        gradients = [value for x in (dq, dk, dv) for value in (_packed_tensor(x) if x.numel() else _ABSENT)]
        cpu_library.kernel("attention_bwd")(
            _BWD.pack(
                *problem, *tensors, lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(), *gradients,
                *_option_gradients(dbias, dsink), *_pointers(lengths), q.shape[0], k.shape[0], bottom_right,
            )
        )  # fmt: skip
    return dq, dk, dv, dbias, dsink


def _packed_sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_q: int, max_k: int) -> Sizes:
    return cu_seqlens_q.shape[0] - 1, max_q, max_k, q.shape[1], k.shape[-2], q.shape[2], v.shape[-1]


def _packed_tensor(x: Tensor) -> tuple[int, ...]:
    """(total, nheads, head_dim) as a struct Tensor4."""
    return (x.data_ptr(), 0, *x.stride())


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointers(tensors: list[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _outputs(q: Tensor, sizes: Sizes, need_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Memory for out and lse, which is empty where nobody needs it."""
    batch, seqlen_q, _, nheads_q, _, _, head_dim_v = sizes
    lse_shape = (batch, nheads_q, seqlen_q) if need_lse else (0,)
    return (
        torch.empty((batch, seqlen_q, nheads_q, head_dim_v), dtype=q.dtype, device=_CPU),
        torch.empty(lse_shape, dtype=torch.float32, device=_CPU),
    )


def _sizes(q: Tensor, v: Tensor) -> Sizes:
    """As spec.qkv_sizes gives them, which has checked them."""
    batch, seqlen_q, nheads_q, head_dim = q.shape
    _, seqlen_k, nheads_kv, head_dim_v = v.shape
    return batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v


def _problem(
    dtype: torch.dtype, sizes: Sizes, key_mask: Tensor | None, scale: float, left: int, right: int, bottom_right: bool,
    options: tuple[int | float, ...] = _NO_OPTIONS,
) -> tuple[int | float, ...]:  # fmt: skip
    """The fields of struct AttentionProblem."""
    shift = sizes[2] - sizes[1] if bottom_right else 0
    mask = _NO_MASK if key_mask is None else (key_mask.data_ptr(), *key_mask.stride())
    return (
        DTYPE_CODES[dtype], torch.get_num_threads(), *sizes, shift, min(left, _FAR), min(right, _FAR), scale, *mask,
        *options,
    )  # fmt: skip


def _score_options(
    attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None, rng_state: Tensor | None,
    softcap: float, dropout_p: float,
) -> tuple[int | float, ...]:  # fmt: skip
    """The fields of struct ScoreOptions."""
    if attn_bias is alibi_slopes is attn_sink is None and softcap == dropout_p == 0.0:
        return _NO_OPTIONS
    alibi: tuple[int, ...] = (0, 0, 0)
    bias: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    sink, rng = (0, 0, 0), (0, 0)
    if alibi_slopes is not None:
        strides = alibi_slopes.stride() if alibi_slopes.dim() == 2 else (0, alibi_slopes.stride(0))
        alibi = (alibi_slopes.data_ptr(), *strides)
    if attn_bias is not None:
        steps = (step if size > 1 else 0 for size, step in zip(attn_bias.shape, attn_bias.stride(), strict=True))
        bias = (attn_bias.data_ptr(), DTYPE_CODES[attn_bias.dtype], *steps)
    if attn_sink is not None:
        sink = (attn_sink.data_ptr(), DTYPE_CODES[attn_sink.dtype], attn_sink.stride(0))
    if dropout_p != 0.0 and rng_state is not None:
        rng = (rng_state.data_ptr(), rng_state.stride(0))
    return softcap, dropout_p, *alibi, *bias, *sink, *rng


def _tensor(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride())


def forward(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None,
    key_mask: Tensor | None, rng_state: Tensor | None, softmax_scale: float, window_left: int, window_right: int,
    bottom_right: bool, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(q, v)
    out, lse = _outputs(q, sizes)
    options = _score_options(attn_bias, alibi_slopes, attn_sink, rng_state, softcap, dropout_p)
    arguments = (
        *_problem(q.dtype, sizes, key_mask, softmax_scale, window_left, window_right, bottom_right, options),
        q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(),
        out.data_ptr(), *out.stride(), lse.data_ptr(), *_NOT_PACKED, *_NO_PAGES,
    )  # fmt: skip
    cpu_library.kernel("attention_fwd")(_FWD.pack(*arguments))
    return out, lse


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None, key_mask: Tensor | None,
    rng_state: Tensor | None, softmax_scale: float, window_left: int, window_right: int, bottom_right: bool,
    softcap: float, dropout_p: float, deterministic: bool, need_dq: bool, need_dkv: bool,
    need_dbias: bool, need_dsink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # torch.empty, not empty_like: gradients are contiguous whatever the inputs' strides.
    make = torch.empty if q.numel() and k.numel() else torch.zeros  # without queries or keys nothing is computed
    dq = make(q.shape if need_dq else 0, dtype=q.dtype)
    dk = make(k.shape if need_dkv else 0, dtype=k.dtype)
    dv = make(v.shape if need_dkv else 0, dtype=v.dtype)
    dbias = _zeros_like(attn_bias if need_dbias else None, q)
    dsink = _zeros_like(attn_sink if need_dsink else None, q)
    keys_matter = k.numel() and (need_dq or need_dkv or need_dbias)
    if q.numel() and (keys_matter or need_dsink):
        lse = lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        options = _score_options(attn_bias, alibi_slopes, attn_sink, rng_state, softcap, dropout_p)
        problem = _problem(
            q.dtype, _sizes(q, v), key_mask, softmax_scale, window_left, window_right, bottom_right, options
        )
        cpu_library.kernel("attention_bwd")(
            _BWD.pack(
                *problem, *_tensor(q), *_tensor(k), *_tensor(v), *_tensor(out), *_tensor(do),
                lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
                *(_tensor(dq) if need_dq else _ABSENT), *(_tensor(dk) if need_dkv else _ABSENT),
                *(_tensor(dv) if need_dkv else _ABSENT), *_option_gradients(dbias, dsink), *_NOT_PACKED,
            )
        )  # fmt: skip
    return dq, dk, dv, dbias, dsink


def _zeros_like(of: Tensor | None, q: Tensor) -> Tensor:
    """A contiguous gradient of that option; empty where nobody needs it."""
    return q.new_empty(0) if of is None else torch.zeros(of.shape, dtype=of.dtype)


def _option_gradients(dbias: Tensor, dsink: Tensor) -> tuple[int, ...]:
    """The fields of struct AttentionBwdArgs from dbias to dsink."""
    bias = (dbias.data_ptr(), *dbias.shape) if dbias.numel() else _ABSENT
    return *bias, dsink.data_ptr() if dsink.numel() else 0


def _page_table(page_table: Tensor, k_cache: Tensor) -> tuple[int, ...]:
    """The fields of struct PageTable."""
    return page_table.data_ptr(), *page_table.stride(), page_table.shape[1], *k_cache.shape[:2]


def _cache_format(cache: Tensor, descale: Tensor | None, pairs: Tensor | None) -> tuple[int, ...]:
    """The fields of struct CacheFormat."""
    scales: tuple[int, ...] = (0, 0, 0)
    if descale is not None:
        scales = (descale.data_ptr(), *(descale.stride() if descale.dim() == 2 else (0, descale.stride(0))))
    groups = (*_ABSENT, 0) if pairs is None else (pairs.data_ptr(), *pairs.stride()[:4], pairs.shape[3])
    return (CACHE_CODES.get(cache.dtype, CACHE_PLAIN), *scales, *groups)


def _next_to_each_other(pairs: Tensor | None) -> Tensor | None:
    """Scale and shift as neighbours; copied where they are not."""
    return pairs if pairs is None or pairs.stride(-1) == 1 else pairs.contiguous()


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None, page_table: Tensor | None,
    alibi_slopes: Tensor | None, attn_sink: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
    k_scale_shift: Tensor | None, v_scale_shift: Tensor | None, softmax_scale: float, window_left: int,
    window_right: int, softcap: float, num_splits: int,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(q, v_cache)
    if k_scale_shift is not None:
        sizes = (*sizes[:6], 2 * sizes[6])
    pages: tuple[int, ...] = _NO_PAGES
    if page_table is not None:
        sizes = (*sizes[:2], page_table.shape[1] * k_cache.shape[1], *sizes[3:])
        pages = _page_table(page_table, k_cache)
    formats: tuple[int, ...] = _PLAIN_CACHES
    if k_descale is not None or v_descale is not None or k_scale_shift is not None:
        k_pairs, v_pairs = _next_to_each_other(k_scale_shift), _next_to_each_other(v_scale_shift)
        formats = (*_cache_format(k_cache, k_descale, k_pairs), *_cache_format(v_cache, v_descale, v_pairs))
    out, lse = _outputs(q, sizes, need_lse)
    if cache_seqlens is not None and not cache_seqlens.is_contiguous():
        cache_seqlens = cache_seqlens.contiguous()
    options = _score_options(None, alibi_slopes, attn_sink, None, softcap, 0.0)
    arguments = _DECODE.pack(
        *_problem(q.dtype, sizes, None, softmax_scale, window_left, window_right, True, options),
        q.data_ptr(), *q.stride(), k_cache.data_ptr(), *k_cache.stride(), v_cache.data_ptr(), *v_cache.stride(),
        out.data_ptr(), *out.stride(), lse.data_ptr() if need_lse else 0,
        0 if cache_seqlens is None else cache_seqlens.data_ptr(), num_splits, *pages, *formats,
    )  # fmt: skip
    try:
        cpu_library.kernel("attention_decode")(arguments)
    except IndexError:  # the kernel looks at the lengths anyway; the words are found here
        check_cache_contents(k_cache, cache_seqlens, page_table)
        raise
    return out, lse


def _merge_problem(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> tuple[int, ...]:
    parts, *batch, seqlen, nheads, head_dim = outs.shape
    return (
        DTYPE_CODES[outs.dtype], torch.get_num_threads(), parts, batch[0] if batch else 1, seqlen, nheads, head_dim,
        outs.data_ptr(), lses.data_ptr(), out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    outs, lses = outs.contiguous(), lses.contiguous()
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    cpu_library.kernel("merge_attention")(_MERGE.pack(*_merge_problem(outs, lses, out, lse)))
    return out, lse


def merge_backward(
    do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    do, outs, lses, out, lse = (x.contiguous() for x in (do, outs, lses, out, lse))
    dlse = None if dlse is None else dlse.contiguous()
    douts, dlses = torch.empty_like(outs), torch.empty_like(lses)
    cpu_library.kernel("merge_attention_bwd")(
        _MERGE_BWD.pack(
            *_merge_problem(outs, lses, out, lse),
            do.data_ptr(), 0 if dlse is None else dlse.data_ptr(), douts.data_ptr(), dlses.data_ptr(),
        )
    )  # fmt: skip
    return douts, dlses
