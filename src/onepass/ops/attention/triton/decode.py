"""attention_decode on GPUs: a few queries over a cache of keys, which is read once (flash-decoding, Dao 2023).

The queries of all heads that share a KV head are the rows of one tile, so that each key is read once for them. The keys
are cut into splits, so that every multiprocessor has work; a second kernel merges the splits' results by their lse.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core import device
from onepass.core.triton_backend import Launcher, is_hopper_or_newer, multiprocessors
from onepass.core.triton_functions import let_next_begin, wait_for_previous
from onepass.ops.attention.spec import check_cache_contents
from onepass.ops.attention.triton import decode_int4
from onepass.ops.attention.triton.config import DecodeConfig, decode_config
from onepass.ops.attention.triton.problem import FAR, as_words, block_of
from onepass.ops.attention.triton.tile import (
    LN_2,
    LOG2_E,
    adjusted_scores,
    decode_place,
    lies_in_one,
    load_tile,
    page_entries,
    part_of,
    placed,
    power_of,
    seen_range,
    softmax_step,
    split_range,
    visible,
    with_sink,
)


def _asm(kind: str) -> tl.constexpr:
    """Two 16-bit words to the fp16 numbers that their low bytes are in fp8, and those that their high bytes are."""
    return tl.constexpr(f"""{{
.reg .b32 a, b;
.reg .b16 low, high, rest;
prmt.b32 a, $2, 0, 0x0020;
prmt.b32 b, $2, 0, 0x0031;
mov.b32 {{low, rest}}, a;
mov.b32 {{high, rest}}, b;
cvt.rn.f16x2.{kind}x2 $0, low;
cvt.rn.f16x2.{kind}x2 $1, high;
}}""")


_E4M3_ASM = _asm("e4m3")
_E5M2_ASM = _asm("e5m2")


@triton.jit
def _bytes_of(word, kind: tl.constexpr, dtype: tl.constexpr, NVIDIA: tl.constexpr):
    """The low and the high bytes of 16-bit words, numbers of a `kind`, as numbers of a dtype."""
    if NVIDIA and dtype == tl.float16 and kind.is_fp8():
        ASM: tl.constexpr = _E4M3_ASM if kind == tl.float8e4nv else _E5M2_ASM
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [word], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        low, high = word.to(tl.int8), (word >> 8).to(tl.int8)
        return low.to(kind, bitcast=True).to(dtype), high.to(kind, bitcast=True).to(dtype)


@triton.jit
def _interleaved(accs, TWO: tl.constexpr):
    """One tile of accumulators of even and odd features."""
    if TWO:
        rows: tl.constexpr = accs[0].shape[0]
        return tl.reshape(tl.join(accs[0], accs[1]), (rows, 2 * accs[0].shape[1]))
    else:
        return accs[0]


@triton.jit
def _attend(
    q, accs, largest, total, k_ptrs, v_ptrs, page_table_ptrs,
    start, end, length, stride_kb, stride_ks, stride_vb, stride_vs, page_size, pages, row,
    slope, shift, window_left, window_right, scale, softcap,
    EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COLS_V: tl.constexpr, BLOCK_V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, V_DTYPE: tl.constexpr, NVIDIA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The keys from start to end; in EDGE blocks some are unseen, or are not stored.

    v has COLS_V columns: features, or with V_DTYPE 16-bit words of two, for which there are two accumulators.
    """
    feature = tl.arange(0, BLOCK_D)
    col_v = tl.arange(0, BLOCK_V)
    lane = tl.arange(0, BLOCK_N)
    if PAGE_SIZE:
        page_size = PAGE_SIZE
    IN_ONE: tl.constexpr = lies_in_one(PAGED, PAGE_SIZE, BLOCK_N)
    if IN_ONE:
        k_ptrs += lane[None, :].to(tl.int64) * stride_ks
        v_ptrs += lane[:, None].to(tl.int64) * stride_vs
    if PAGED:  # the pages of the next block are found while this one is worked on
        next_page = page_entries(page_table_ptrs, start if IN_ONE else start + lane, length, page_size)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        key = first + lane
        there = key < length if EDGE else tl.full((BLOCK_N,), 1, tl.int1)
        read = there
        at = first if IN_ONE else key
        at_k, at_v = tl.cast(at, tl.int64) * stride_ks, tl.cast(at, tl.int64) * stride_vs
        if PAGED:
            page, place, exists = placed(next_page, at, page_size, pages)
            next_page = page_entries(page_table_ptrs, at + BLOCK_N, length, page_size)
            at_k, at_v = page * stride_kb + place * stride_ks, page * stride_vb + place * stride_vs
            read = there & exists
        if not IN_ONE:
            at_k, at_v = at_k[None, :], at_v[:, None]
        k = load_tile(k_ptrs + at_k, read[None, :], feature[:, None] < HEAD_DIM, EDGE or PAGED, HEAD_DIM != BLOCK_D)
        v = load_tile(v_ptrs + at_v, read[:, None], col_v[None, :] < COLS_V, EDGE or PAGED, COLS_V != BLOCK_V)
        s = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        s, _ = adjusted_scores(
            s, row[:, None], key[None, :], first, shift, scale, softcap, slope, 0.0, SOFTCAP, ALIBI, False
        )
        if PAGED:  # a page that does not exist is not read, and shows as NaN
            s = tl.where((there & ~exists)[None, :], float("nan"), s)
        if EDGE:
            seen = there[None, :]
            if LEFT or RIGHT:
                seen = seen & visible(row[:, None], key[None, :], shift, window_left, window_right, LEFT, RIGHT)
            s = tl.where(seen, s, -float("inf"))
        p, correction, largest, total = softmax_step(s, LOG2_E, largest, total, 1, False)
        p = p.to(q.dtype)
        if V_DTYPE is None:
            accs = (tl.dot(p, v.to(q.dtype), accs[0] * correction[:, None], input_precision=PRECISION),)
        else:
            even, odd = _bytes_of(v, V_DTYPE, q.dtype, NVIDIA)
            accs = (
                tl.dot(p, even, accs[0] * correction[:, None], input_precision=PRECISION),
                tl.dot(p, odd, accs[1] * correction[:, None], input_precision=PRECISION),
            )
    return accs, largest, total


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlens_ptr, page_table_ptr, slopes_ptr, sink_ptr, k_descale_ptr,
    v_descale_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_tb, stride_ab, stride_ah,
    stride_kdb, stride_kdh, stride_vdb, stride_vdh,
    batch_size, seqlen_q, capacity, nheads_q, page_size, pages, splits,
    window_left, window_right, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    COLS_V: tl.constexpr, BLOCK_V: tl.constexpr, V_DTYPE: tl.constexpr, NVIDIA: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINK: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, LENGTHS: tl.constexpr,
    K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr, NEED_LSE: tl.constexpr, SPLIT: tl.constexpr,
    BY_FP16: tl.constexpr, FOLLOWED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (query, head of the group) of one KV head over one split of its keys.

    With SPLIT out_ptr is fp32 (splits, rows of all), lse_ptr in log2 units; else they are the results.
    """
    if FOLLOWED:
        let_next_begin()
    split = tl.program_id(1)
    kv_head, batch, first_packed = decode_place(nheads_q // GROUP, seqlen_q * GROUP, BLOCK_M)
    packed = first_packed + tl.arange(0, BLOCK_M)
    there = packed < seqlen_q * GROUP
    row = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    row_read = tl.minimum(row, seqlen_q - 1).to(tl.int64)
    feature = tl.arange(0, BLOCK_D)
    feature_v = tl.arange(0, BLOCK_V if V_DTYPE is None else 2 * BLOCK_V)
    length = capacity
    if LENGTHS:
        length = tl.minimum(tl.load(seqlens_ptr + batch), capacity)
    shift = length - seqlen_q
    q = load_tile(
        q_ptr + batch * stride_qb + row_read[:, None] * stride_qs + head[:, None] * stride_qh
        + feature[None, :].to(tl.int64) * stride_qd,
        there[:, None], feature[None, :] < HEAD_DIM, False, HEAD_DIM != BLOCK_D,
    )  # fmt: skip
    if BY_FP16:
        # A power of two off each row: what is left of q fits fp16 whatever its dtype, and has no fewer bits that count.
        power = power_of(tl.max(tl.abs(q.to(tl.float32)), 1))[:, None]
        q = (q.to(tl.float32) / power).to(tl.float16)
        scale = scale * power
    slope = tl.zeros((BLOCK_M, 1), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)[:, None]
    if K_DESCALE:
        scale *= tl.load(k_descale_ptr + batch * stride_kdb + kv_head * stride_kdh)
    k_ptrs = k_ptr + kv_head * stride_kh + feature[:, None].to(tl.int64) * stride_kd
    v_ptrs = v_ptr + kv_head * stride_vh + tl.arange(0, BLOCK_V)[None, :].to(tl.int64) * stride_vd
    page_table_ptrs = page_table_ptr
    if PAGED:
        page_table_ptrs = page_table_ptr + batch * stride_tb
    else:
        k_ptrs += batch * stride_kb
        v_ptrs += batch * stride_vb
    first_row = first_packed // GROUP
    last_row = tl.minimum(first_packed + BLOCK_M - 1, seqlen_q * GROUP - 1) // GROUP
    if SPLIT:
        start, inner_start, inner_end, end = split_range(
            first_row, last_row, window_left - shift, window_right + shift, length, split, splits, LEFT, RIGHT, BLOCK_N
        )
    else:
        start, inner_start, inner_end, end = seen_range(
            first_row, last_row, window_left - shift, window_right + shift, length, LEFT, RIGHT, BLOCK_N
        )
    accs = ()
    for _ in tl.static_range(1 if V_DTYPE is None else 2):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_V), tl.float32),)  # noqa: RUF005
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Before the inner blocks (only a window has such), those, and after them.
    for part in tl.static_range(0 if LEFT else 1, 3):
        first, last = part_of(part, start, inner_start, inner_end, end, end)
        accs, largest, total = _attend(
            q, accs, largest, total, k_ptrs, v_ptrs, page_table_ptrs,
            first, last, length, stride_kb, stride_ks, stride_vb, stride_vs, page_size, pages, row,
            slope, shift, window_left, window_right, scale, softcap,
            part != 1, HEAD_DIM, BLOCK_D, COLS_V, BLOCK_V, LEFT, RIGHT, SOFTCAP, ALIBI, PAGED, PAGE_SIZE, V_DTYPE,
            NVIDIA, PRECISION, BLOCK_N, STAGES,
        )  # fmt: skip
    acc = _interleaved(accs, V_DTYPE is not None)
    if SINK and not SPLIT:
        acc, largest, total = with_sink(acc, largest, total, tl.load(sink_ptr + head), False)
    empty = total == 0.0
    top = tl.where(largest == -float("inf"), 0.0, largest)
    out = acc / tl.where(empty, 1.0, total)[:, None]
    if V_DESCALE:
        out *= tl.load(v_descale_ptr + batch * stride_vdb + kv_head * stride_vdh)
    at = (batch * seqlen_q + row) * nheads_q + head  # of (batch, seqlen_q, nheads_q)
    mask = there[:, None] & (feature_v[None, :] < HEAD_DIM_V)
    if SPLIT:
        part = split.to(tl.int64) * batch_size * seqlen_q * nheads_q + at
        tl.store(lse_ptr + part, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=there)
        tl.store(out_ptr + part[:, None] * HEAD_DIM_V + feature_v[None, :], out, mask=mask)
    else:
        out_ptrs = out_ptr + at[:, None] * HEAD_DIM_V + feature_v[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
        if NEED_LSE:
            lse = tl.where(empty, -float("inf"), top * LN_2 + tl.log(total))
            tl.store(lse_ptr + (batch * nheads_q + head) * seqlen_q + row, lse, mask=there)


@triton.jit
def _merge_kernel(
    parts_ptr, lses_ptr, sink_ptr, out_ptr, lse_ptr, rows, seqlen_q, nheads_q, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, SINK: tl.constexpr, NEED_LSE: tl.constexpr,
    SPLITS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """BLOCK_DV features of a row (batch, query, head) from its splits."""
    if FOLLOWS:
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    head = row % nheads_q
    split = tl.arange(0, SPLITS)
    there = split < splits
    lses = tl.load(lses_ptr + split.to(tl.int64) * rows + row, mask=there, other=-float("inf"))
    top = tl.max(lses, 0)
    if SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2(lses - top)
    total = tl.sum(weights, 0)
    if SINK:
        total += tl.exp2(sink - top)
    empty = total == 0.0
    feature = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    parts = tl.load(
        parts_ptr + (split.to(tl.int64) * rows + row)[:, None] * HEAD_DIM_V + feature[None, :],
        mask=there[:, None] & (feature < HEAD_DIM_V)[None, :],
        other=0.0,
    )
    out = tl.sum(tl.where((weights == 0.0)[:, None], 0.0, weights[:, None] * parts), 0) / tl.where(empty, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM_V + feature, out.to(out_ptr.dtype.element_ty), mask=feature < HEAD_DIM_V)
    if NEED_LSE and tl.program_id(1) == 0:
        token = row // nheads_q
        at = (token // seqlen_q * nheads_q + head) * seqlen_q + token % seqlen_q
        tl.store(lse_ptr + at, tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN_2))


_WORD_HALVES = {
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.float8_e5m2fnuz: tl.float8e5b16,
}

_decode = Launcher(_decode_kernel)
_merge = Launcher(_merge_kernel)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None, page_table: Tensor | None,
    alibi_slopes: Tensor | None, attn_sink: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
    k_scale_shift: Tensor | None, v_scale_shift: Tensor | None, softmax_scale: float, window_left: int,
    window_right: int, softcap: float, num_splits: int, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (batch, seqlen_q, nheads_q, head_dim_v) and lse (batch, nheads_q, seqlen_q), which is empty if not needed."""
    if q.is_cpu:  # the interpreter: contents can be looked at
        check_cache_contents(k_cache, cache_seqlens, page_table)
    batch, seqlen_q, nheads_q, head_dim = q.shape
    pairs = None if k_scale_shift is None or v_scale_shift is None else (k_scale_shift, v_scale_shift)
    nheads_kv, head_dim_v = k_cache.shape[2], v_cache.shape[3] * (1 if pairs is None else 2)
    group = nheads_q // nheads_kv
    capacity = k_cache.shape[1] if page_table is None else page_table.shape[1] * k_cache.shape[1]
    out = torch.empty((batch, seqlen_q, nheads_q, head_dim_v), dtype=q.dtype, device=q.device)
    lse_shape = (batch, nheads_q, seqlen_q) if need_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    groups = 0 if pairs is None else max(x.shape[3] for x in pairs)
    config = decode_config(
        q, head_dim_v, rows=seqlen_q * group, paged=page_table is not None, bytes_stored=v_cache.itemsize, groups=groups
    )
    nvidia = device.arch(q).startswith("sm_")
    least_rows = 8 if pairs is not None and nvidia else 16  # of a matrix instruction: int4's rows are its columns
    block_m = max(least_rows, min(config.most_rows, 1 << (seqlen_q * group - 1).bit_length()))
    tiles = batch * nheads_kv * triton.cdiv(seqlen_q * group, block_m)
    blocks = max(1, triton.cdiv(capacity, config.block_n))
    splits = min(num_splits or _splits(tiles, blocks, q.device, config), blocks, config.most_splits)
    attn_sink = None if attn_sink is None else attn_sink.contiguous()
    rows = batch * seqlen_q * nheads_q
    parts, part_lses = out, lse
    merges = splits > 1 or pairs is not None  # int4 leaves sinks and dtypes to the merging kernel
    if merges:
        parts = torch.empty((splits, rows, head_dim_v), dtype=torch.float32, device=q.device)
        part_lses = torch.empty((splits, rows), dtype=torch.float32, device=q.device)
    scale = softmax_scale / softcap if softcap else softmax_scale
    window = min(window_left, FAR), min(window_right, FAR)
    # One query sees every key that is stored: nothing to mask but the end.
    limits = {"LEFT": window_left >= 0, "RIGHT": window_right >= 0 and seqlen_q > 1, "SOFTCAP": softcap != 0.0}
    places = {
        "PAGED": page_table is not None,
        "PAGE_SIZE": _known_page_size(k_cache, page_table),
        "LENGTHS": cache_seqlens is not None,
    }
    followed = merges and is_hopper_or_newer(device.arch(q))
    cut = {
        "FOLLOWED": followed,
        "PRECISION": "tf32" if device.allows_tf32(q) else "ieee",
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    sizes = batch, seqlen_q, capacity, nheads_q, k_cache.shape[1], k_cache.shape[0], splits
    grid = (tiles, splits, 1)
    lengths, table = _contiguous(cache_seqlens), _contiguous(page_table)
    max_pages = 0 if page_table is None else page_table.shape[1]
    if pairs is not None:
        decode_int4.run(
            grid,
            (q, k_cache, v_cache, *pairs),
            (parts, part_lses, lengths, table, alibi_slopes),
            (max_pages, *_head_strides(alibi_slopes), *sizes, *window, scale, softcap),
            {"GROUP": group, "HEAD_DIM_V": head_dim_v, **limits, "ALIBI": alibi_slopes is not None, **places},
            cut,
            config.num_warps,
        )
    else:
        by_fp16 = q.itemsize == 2 and _is_fp8(k_cache) and _is_fp8(v_cache)
        v_cache, columns = _by_words(v_cache)
        _decode.launch(
            grid,
            q.device,
            (
                q, k_cache, v_cache, parts, part_lses, lengths, table, alibi_slopes, attn_sink, k_descale, v_descale,
                *q.stride(), *k_cache.stride(), *v_cache.stride(), max_pages,
                *_head_strides(alibi_slopes), *_head_strides(k_descale), *_head_strides(v_descale),
                *sizes, *window, scale, softcap,
            ),
            {
                "GROUP": group,
                "HEAD_DIM": head_dim,
                "HEAD_DIM_V": head_dim_v,
                "BLOCK_D": block_of(head_dim),
                **columns,
                "NVIDIA": nvidia,
                **limits,
                "ALIBI": alibi_slopes is not None,
                "SINK": attn_sink is not None,
                **places,
                "K_DESCALE": k_descale is not None,
                "V_DESCALE": v_descale is not None,
                "NEED_LSE": need_lse,
                "SPLIT": splits > 1,
                "BY_FP16": by_fp16,
                **cut,
            },
            num_warps=config.num_warps,
        )  # fmt: skip
    if merges:
        _merge_parts(parts, part_lses, attn_sink, out, lse, need_lse, followed)
    return out, lse


def _merge_parts(
    parts: Tensor, part_lses: Tensor, attn_sink: Tensor | None, out: Tensor, lse: Tensor, need_lse: bool,
    follows: bool,
) -> None:  # fmt: skip
    """Fills out and lse from the splits' results (splits, rows, head_dim_v)."""
    splits, rows, head_dim_v = parts.shape
    few = rows < multiprocessors(out.device)
    block = block_of(min(head_dim_v, 32) if few else head_dim_v)
    _merge.launch(
        (rows, triton.cdiv(head_dim_v, block), 1),
        out.device,
        (parts, part_lses, attn_sink, out, lse, rows, *out.shape[1:3], splits),
        {
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_DV": block,
            "SINK": attn_sink is not None,
            "NEED_LSE": need_lse,
            "SPLITS": max(2, triton.next_power_of_2(splits)),
            "FOLLOWS": follows,
        },
        num_warps=4,
        follows=follows,
    )


@functools.lru_cache(1024)
def _splits(tiles: int, blocks: int, on: torch.device, config: DecodeConfig) -> int:
    """The least number of splits whose waves of programs leave nearly as few multiprocessors idle as the best."""
    at_once = multiprocessors(on) * config.programs_per_processor
    if tiles >= 4 * at_once:
        return 1
    most = min(blocks, config.most_splits, max(1, math.ceil(4 * at_once / tiles)))

    def busy(splits: int) -> float:
        # Splits are whole blocks: the longest decides.
        even = blocks / (triton.cdiv(blocks, splits) * splits)
        waves = tiles * splits / at_once
        return even * waves / math.ceil(waves)

    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.95 * best)


def _is_fp8(cache: Tensor) -> bool:
    """Hopper converts fp8 to fp16 in half an instruction a number, to bf16 in more than one."""
    return cache.dtype.is_floating_point and cache.itemsize == 1


def _known_page_size(k_cache: Tensor, page_table: Tensor | None) -> int:
    """A power of two, by which kernels divide with a shift; 0 if it is another or there are no pages."""
    size = k_cache.shape[1]
    return size if page_table is not None and size & (size - 1) == 0 else 0


def _by_words(v_cache: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """v_cache as 16-bit words of two features where it can be, and the kernel's constants for its columns.

    Matrix instructions take V transposed, which the hardware does for 16-bit numbers; bytes are read one by one.
    """
    dtype = None
    words = as_words(v_cache) if v_cache.itemsize == 1 else None
    if words is not None:
        dtype, v_cache = _WORD_HALVES[v_cache.dtype], words
    columns = v_cache.shape[3]
    return v_cache, {"COLS_V": columns, "BLOCK_V": block_of(columns), "V_DTYPE": dtype}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _head_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of (nheads,) or (batch, nheads) as (batch, head)."""
    if x is None:
        return 0, 0
    return x.stride(0) if x.dim() == 2 else 0, x.stride(-1)
