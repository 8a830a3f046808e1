"""append_kv on GPUs: a program takes rows (sequence, token, head) of keys and values to their places in the caches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.append_kv.spec import check_append_contents

_FP16_LARGEST: tl.constexpr = tl.constexpr(65504.0)
_ROWS = 16


@triton.jit
def _nearest(x):
    """The nearest integer of |x| < 2^22, half to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _cut(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _features(ptrs, stride, first, step, there, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Features first, first + step, ... of rows as fp32, SIZE of them."""
    at = tl.arange(0, BLOCK)[None, :]
    x = tl.load(ptrs + (first + at * step).to(tl.int64) * stride, mask=there[:, None] & (at < SIZE), other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(
    x_ptrs, stride_x, cache_ptrs, stride_cache, pair_ptrs, stride_pg, stride_pp, descale, there,
    HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, DESCALE: tl.constexpr, LARGEST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of keys or of values: as they are, divided by descale, or with GROUPS in int4."""
    feature = tl.arange(0, BLOCK_D)[None, :]
    if GROUPS:
        HALF: tl.constexpr = HEAD_DIM // GROUPS // 2  # bytes of a group
        inside = feature < HALF
        for group in tl.static_range(GROUPS):
            even = _features(x_ptrs, stride_x, 2 * group * HALF, 2, there, HALF, BLOCK_D)
            odd = _features(x_ptrs, stride_x, 2 * group * HALF + 1, 2, there, HALF, BLOCK_D)
            low = tl.min(tl.where(inside, tl.minimum(even, odd), float("inf")), 1)
            high = tl.max(tl.where(inside, tl.maximum(even, odd), -float("inf")), 1)
            shift_16 = _cut(low, -_FP16_LARGEST, _FP16_LARGEST).to(tl.float16)
            shift = shift_16.to(tl.float32)[:, None]
            scale_16 = _cut(tl.div_rn(high - tl.max(shift, 1), 15.0), 0.0, _FP16_LARGEST).to(tl.float16)
            scale = scale_16.to(tl.float32)[:, None]
            divisor = tl.broadcast_to(tl.where(scale == 0.0, float("inf"), scale), even.shape)
            low_nibble = _cut(_nearest(tl.div_rn(even - shift, divisor)), 0.0, 15.0).to(tl.int32)
            high_nibble = _cut(_nearest(tl.div_rn(odd - shift, divisor)), 0.0, 15.0).to(tl.int32)
            at = (group * HALF + feature).to(tl.int64) * stride_cache
            byte = (low_nibble | (high_nibble << 4)).to(tl.uint8)
            tl.store(cache_ptrs + at, byte, mask=there[:, None] & inside)
            tl.store(pair_ptrs + group * stride_pg, scale_16[:, None], mask=there[:, None])
            tl.store(pair_ptrs + group * stride_pg + stride_pp, shift_16[:, None], mask=there[:, None])
    else:
        mask = there[:, None] & (feature < HEAD_DIM)
        x = tl.load(x_ptrs + feature.to(tl.int64) * stride_x, mask=mask, other=0.0)
        if DESCALE:
            x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(descale[:, None], x.shape))
            x = _cut(x, -LARGEST, LARGEST)
            if cache_ptrs.dtype.element_ty == tl.int8:
                x = _nearest(x)
        tl.store(cache_ptrs + feature.to(tl.int64) * stride_cache, x.to(cache_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, seqlens_ptr, page_table_ptr, k_descale_ptr, v_descale_ptr, k_pairs_ptr,
    v_pairs_ptr,
    stride_kb, stride_ks, stride_kh, stride_kd, stride_vb, stride_vs, stride_vh, stride_vd,
    stride_kcb, stride_kcs, stride_kch, stride_kcd, stride_vcb, stride_vcs, stride_vch, stride_vcd,
    stride_kdb, stride_kdh, stride_vdb, stride_vdh,
    stride_kpb, stride_kps, stride_kph, stride_kpg, stride_kpp, stride_vpb, stride_vps, stride_vph, stride_vpg,
    stride_vpp,
    rows, seqlen_new, nheads, max_pages, page_size, pages,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGED: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr, K_LARGEST: tl.constexpr,
    V_LARGEST: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows whose place does not exist are not written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    head = row % nheads
    token = row // nheads
    batch = token // seqlen_new
    new = token % seqlen_new
    position = tl.load(seqlens_ptr + batch, mask=there, other=-1).to(tl.int64) + new
    there = there & (position >= 0)
    if PAGED:
        there = there & (position < max_pages * page_size)
        page = tl.load(page_table_ptr + batch * max_pages + position // page_size, mask=there, other=-1).to(tl.int64)
        place = position % page_size
        there = there & (page >= 0) & (page < pages)
    else:
        page, place = batch, position
        there = there & (position < page_size)
    k_descale, v_descale, k_pairs, v_pairs = k_descale_ptr, v_descale_ptr, k_pairs_ptr, v_pairs_ptr
    if K_DESCALE:
        k_descale = tl.load(k_descale_ptr + batch * stride_kdb + head * stride_kdh, mask=there, other=1.0)
    if V_DESCALE:
        v_descale = tl.load(v_descale_ptr + batch * stride_vdb + head * stride_vdh, mask=there, other=1.0)
    if K_GROUPS:
        k_pairs = k_pairs_ptr + (page * stride_kpb + place * stride_kps + head * stride_kph)[:, None]
        v_pairs = v_pairs_ptr + (page * stride_vpb + place * stride_vps + head * stride_vph)[:, None]
    _store(
        k_ptr + (batch * stride_kb + new * stride_ks + head * stride_kh)[:, None], stride_kd,
        k_cache_ptr + (page * stride_kcb + place * stride_kcs + head * stride_kch)[:, None], stride_kcd,
        k_pairs, stride_kpg, stride_kpp, k_descale, there, HEAD_DIM, K_GROUPS, K_DESCALE, K_LARGEST, BLOCK_D,
    )  # fmt: skip
    _store(
        v_ptr + (batch * stride_vb + new * stride_vs + head * stride_vh)[:, None], stride_vd,
        v_cache_ptr + (page * stride_vcb + place * stride_vcs + head * stride_vch)[:, None], stride_vcd,
        v_pairs, stride_vpg, stride_vpp, v_descale, there, HEAD_DIM_V, V_GROUPS, V_DESCALE, V_LARGEST, BLOCK_DV,
    )  # fmt: skip


_append = Launcher(_append_kernel)


def append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None, k_scale_shift: Tensor | None, v_scale_shift: Tensor | None,
) -> None:  # fmt: skip
    if k.is_cpu:  # the interpreter: contents can be looked at
        check_append_contents(k, k_cache, cache_seqlens, page_table)
    batch, seqlen_new, nheads, head_dim = k.shape
    rows = batch * seqlen_new * nheads
    if not rows:
        return
    k_groups = 0 if k_scale_shift is None else k_scale_shift.shape[3]
    v_groups = 0 if v_scale_shift is None else v_scale_shift.shape[3]
    _append.launch(
        (triton.cdiv(rows, _ROWS), 1, 1),
        k.device,
        (
            k, v, k_cache, v_cache, cache_seqlens.contiguous(), None if page_table is None else page_table.contiguous(),
            k_descale, v_descale, k_scale_shift, v_scale_shift,
            *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
            *_head_strides(k_descale), *_head_strides(v_descale), *_strides(k_scale_shift), *_strides(v_scale_shift),
            rows, seqlen_new, nheads, 0 if page_table is None else page_table.shape[1], k_cache.shape[1],
            k_cache.shape[0],
        ),
        {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": v.shape[3],
            "BLOCK_D": _block(head_dim, k_groups),
            "BLOCK_DV": _block(v.shape[3], v_groups),
            "PAGED": page_table is not None,
            "K_DESCALE": k_descale is not None,
            "V_DESCALE": v_descale is not None,
            "K_LARGEST": _largest(k_cache.dtype),
            "V_LARGEST": _largest(v_cache.dtype),
            "K_GROUPS": k_groups,
            "V_GROUPS": v_groups,
            "ROWS": _ROWS,
        },
        num_warps=4,
    )  # fmt: skip


def _block(head_dim: int, groups: int) -> int:
    return triton.next_power_of_2(max(2, head_dim // (2 * groups) if groups else head_dim))


def _largest(dtype: torch.dtype) -> float:
    """Of what is quantised."""
    return 127.0 if dtype is torch.int8 or not dtype.is_floating_point else torch.finfo(dtype).max


def _head_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of (nheads,) or (batch, nheads) as (batch, head)."""
    if x is None:
        return 0, 0
    return x.stride(0) if x.dim() == 2 else 0, x.stride(-1)


def _strides(pairs: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if pairs is None else pairs.stride()
