"""The C++ kernels: packs a call into the argument structs of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES
from onepass.ops.attention.spec import Sizes, check_cache_contents

_ABSENT = (0, 0, 0, 0, 0)
_NO_MASK = (0, 0, 0)
_FAR = 1 << 40  # windows are clamped here, so that index arithmetic cannot overflow

# struct AttentionProblem, then the rest of each argument struct: q = int64_t or pointer, d = double.
_PROBLEM = "12qd3q"
_TENSOR = "5q"
_FWD = struct.Struct(f"={_PROBLEM}{4 * _TENSOR}q")
_BWD = struct.Struct(f"={_PROBLEM}{5 * _TENSOR}2q{3 * _TENSOR}")
_DECODE = struct.Struct(f"={_PROBLEM}{4 * _TENSOR}3q")
_MERGE = struct.Struct("=11q")
_MERGE_BWD = struct.Struct("=15q")

_CPU = torch.device("cpu")


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
    dtype: torch.dtype, sizes: Sizes, key_mask: Tensor | None, scale: float, left: int, right: int, bottom_right: bool
) -> tuple[int | float, ...]:
    """The fields of struct AttentionProblem."""
    shift = sizes[2] - sizes[1] if bottom_right else 0
    mask = _NO_MASK if key_mask is None else (key_mask.data_ptr(), *key_mask.stride())
    return DTYPE_CODES[dtype], torch.get_num_threads(), *sizes, shift, min(left, _FAR), min(right, _FAR), scale, *mask


def _tensor(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride())


def forward(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None,
    key_mask: Tensor | None, rng_state: Tensor | None, softmax_scale: float, window_left: int, window_right: int,
    bottom_right: bool, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(q, v)
    out, lse = _outputs(q, sizes)
    arguments = (
        *_problem(q.dtype, sizes, key_mask, softmax_scale, window_left, window_right, bottom_right),
        q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(),
        out.data_ptr(), *out.stride(), lse.data_ptr(),
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
    if q.numel() and k.numel() and (need_dq or need_dkv):
        lse = lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        cpu_library.kernel("attention_bwd")(
            _BWD.pack(
                *_problem(q.dtype, _sizes(q, v), key_mask, softmax_scale, window_left, window_right, bottom_right),
                *_tensor(q), *_tensor(k), *_tensor(v), *_tensor(out), *_tensor(do),
                lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
                *(_tensor(dq) if need_dq else _ABSENT), *(_tensor(dk) if need_dkv else _ABSENT),
                *(_tensor(dv) if need_dkv else _ABSENT),
            )
        )  # fmt: skip
    return dq, dk, dv, q.new_empty(0), q.new_empty(0)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None, page_table: Tensor | None,
    alibi_slopes: Tensor | None, attn_sink: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
    k_scale_shift: Tensor | None, v_scale_shift: Tensor | None, softmax_scale: float, window_left: int,
    window_right: int, softcap: float, num_splits: int,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(q, v_cache)
    out, lse = _outputs(q, sizes, need_lse)
    if cache_seqlens is not None and not cache_seqlens.is_contiguous():
        cache_seqlens = cache_seqlens.contiguous()
    arguments = _DECODE.pack(
        *_problem(q.dtype, sizes, None, softmax_scale, window_left, window_right, True),
        q.data_ptr(), *q.stride(), k_cache.data_ptr(), *k_cache.stride(), v_cache.data_ptr(), *v_cache.stride(),
        out.data_ptr(), *out.stride(), lse.data_ptr() if need_lse else 0,
        0 if cache_seqlens is None else cache_seqlens.data_ptr(), num_splits,
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
