"""attention_decode over int4 caches: nibbles go into matrix products as they are, scales and shifts follow outside.

With a key's features as nibble * scale + shift, four of them in a 16-bit word, the first in its lowest bits:

    q . k       =  scale (q_0 . n_0 + q_1 . n_1 + q_2 . n_2 + q_3 . n_3) + shift sum(q)
    (p v)_part  =  (p scale) n_part + sum(p shift)

where n_part is the part's nibble of every word and q_part is every fourth feature of q. So nothing is shuffled:
products of a quarter of the depth, outputs of a quarter of the width; and 16-bit words are what the hardware transposes
for its matrix instructions. Caches that do not lie so are read by bytes, with two parts. Two nibbles become 16-bit
numbers by a shift and one bit operation, as the leading bits of 1 + n / 16; what that adds goes with the shifts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core import device
from onepass.core.triton_backend import Launcher
from onepass.ops.attention.triton.problem import as_words, block_of
from onepass.ops.attention.triton.tile import (
    LOG2_E,
    adjusted_scores,
    lies_in_one,
    load_tile,
    page_entries,
    part_of,
    placed,
    softmax_step,
    split_range,
    visible,
)


def _asm(source: str, parts: dict[str, int], mantissa: int, one: int) -> tl.constexpr:
    """Outputs $0.. of nibbles that begin at bits of registers: 1 + n / 16 in the halves of each, with that mantissa."""
    place = mantissa - 4
    mask, one = 0x000F000F << place, one << 16 | one
    lines = []
    for index, (name, first_bit) in enumerate(parts.items()):
        move = first_bit - place
        lines.append(f"{'shr' if move >= 0 else 'shl'}.b32 t, {name.rstrip('+')}, {abs(move)};")
        lines.append(f"lop3.b32 ${index}, t, {mask:#x}, {one:#x}, 0xea;")
    return tl.constexpr("\n".join(["{", ".reg .b32 a, b, t;", source, *lines, "}"]))


# Two words to four parts; four bytes, apart in two registers first, to two parts.
_WORDS = "", {"$4": 0, "$4+": 4, "$4++": 8, "$4+++": 12}
_BYTES = "prmt.b32 a, $4, 0, 0x4140;\nprmt.b32 b, $4, 0, 0x4342;", {"a": 0, "b": 0, "a+": 4, "b+": 4}
_BF16, _FP16 = (7, 0x3F80), (10, 0x3C00)
_BF16_WORDS = _asm(*_WORDS, *_BF16)
_FP16_WORDS = _asm(*_WORDS, *_FP16)
_BF16_BYTES = _asm(*_BYTES, *_BF16)
_FP16_BYTES = _asm(*_BYTES, *_FP16)


@triton.jit
def _nibbles(x, dtype: tl.constexpr, PARTS: tl.constexpr, LEADING: tl.constexpr):
    """The parts of words (4) or bytes (2), the lowest bits first: n, or 1 + n / 16 if LEADING."""
    if LEADING and dtype == tl.bfloat16 and PARTS == 4:
        return tl.inline_asm_elementwise(
            _BF16_WORDS, "=r,=r,=r,=r,r", [x], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif LEADING and PARTS == 4:
        return tl.inline_asm_elementwise(
            _FP16_WORDS, "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif LEADING and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_BYTES, "=r,=r,=r,=r,r", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif LEADING:
        return tl.inline_asm_elementwise(
            _FP16_BYTES, "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif PARTS == 4:
        return (x & 15).to(dtype), ((x >> 4) & 15).to(dtype), ((x >> 8) & 15).to(dtype), ((x >> 12) & 15).to(dtype)
    else:
        return (x & 15).to(dtype), (x >> 4).to(dtype)


@triton.jit
def _scale_and_shift(ptrs, there):
    """fp32 scales and shifts of keys, from words that hold two fp16."""
    word = tl.load(ptrs, mask=there, other=0)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    shift = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, shift


@triton.jit
def _attend(
    q_parts, q_sum, accs, flat, largest, total, k_base, v_base, k_pairs, v_pairs, page_table_ptrs,
    start, end, length, stride_kb, stride_ks, stride_kd, stride_vb, stride_vs, stride_vd,
    stride_kpb, stride_kps, stride_kpg, stride_vpb, stride_vps, stride_vpg, page_size, pages, row,
    slope, shift, window_left, window_right, scale, softcap,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    COLS_K: tl.constexpr, ROWS_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PARTS_K: tl.constexpr, PARTS_V: tl.constexpr, DTYPE: tl.constexpr, LEADING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The keys from start to end; in EDGE blocks some are unseen, or are not stored.

    COLS_K, ROWS_V: words or bytes of a group. flat: what shifts add.
    """
    col_k = tl.arange(0, BLOCK_K)[None, :]
    row_v = tl.arange(0, BLOCK_V)[:, None]
    lane = tl.arange(0, BLOCK_N)
    if PAGE_SIZE:
        page_size = PAGE_SIZE
    IN_ONE: tl.constexpr = lies_in_one(PAGED, PAGE_SIZE, BLOCK_N)
    k_ptrs = k_base + col_k.to(tl.int64) * stride_kd
    v_ptrs = v_base + row_v.to(tl.int64) * stride_vd
    if IN_ONE:
        k_ptrs += lane[:, None].to(tl.int64) * stride_ks
        v_ptrs += lane[None, :].to(tl.int64) * stride_vs
        k_pairs += lane.to(tl.int64) * stride_kps
        v_pairs += lane.to(tl.int64) * stride_vps
    if PAGED:  # the pages of the next block are found while this one is worked on
        next_page = page_entries(page_table_ptrs, start if IN_ONE else start + lane, length, page_size)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        key = first + lane
        there = key < length if EDGE else tl.full((BLOCK_N,), 1, tl.int1)
        read = there
        place = first if IN_ONE else key
        page = tl.zeros_like(place)
        if PAGED:
            page, place, exists = placed(next_page, place, page_size, pages)
            next_page = page_entries(page_table_ptrs, (first if IN_ONE else key) + BLOCK_N, length, page_size)
            read = there & exists
        page, place = tl.cast(page, tl.int64), tl.cast(place, tl.int64)
        at_k, at_v = page * stride_kb + place * stride_ks, page * stride_vb + place * stride_vs
        if not IN_ONE:
            at_k, at_v = at_k[:, None], at_v[None, :]
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for group in tl.static_range(K_GROUPS):
            k_scale, k_shift = _scale_and_shift(
                k_pairs + (page * stride_kpb + place * stride_kps + tl.cast(group, tl.int64) * stride_kpg), read
            )
            k = load_tile(
                k_ptrs + (at_k + tl.cast(group * COLS_K, tl.int64) * stride_kd), read[:, None], col_k < COLS_K,
                EDGE or PAGED, COLS_K != BLOCK_K,
            )  # fmt: skip
            nibbles = _nibbles(k, DTYPE, PARTS_K, LEADING)
            product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.static_range(PARTS_K):
                product = tl.dot(nibbles[part], q_parts[group * PARTS_K + part], product, input_precision=PRECISION)
            if LEADING:  # n is 16 (1 + n / 16) - 16
                k_scale *= 16.0
                k_shift -= k_scale
            if not SOFTCAP:  # once a key in place of once a score
                k_scale, k_shift = k_scale * scale, k_shift * scale
            s += product * k_scale[:, None] + k_shift[:, None] * q_sum[group][None, :]
        s, _ = adjusted_scores(
            s, key[:, None], row[None, :], first - shift, -shift, scale if SOFTCAP else 1.0, softcap, slope, 0.0,
            SOFTCAP, ALIBI, False,
        )  # fmt: skip
        if PAGED:  # a page that does not exist is not read, and shows as NaN
            s = tl.where((there & ~exists)[:, None], float("nan"), s)
        if EDGE:
            seen = there[:, None]
            if LEFT or RIGHT:
                seen = seen & visible(row[None, :], key[:, None], shift, window_left, window_right, LEFT, RIGHT)
            s = tl.where(seen, s, -float("inf"))
        p, correction, largest, total = softmax_step(s, LOG2_E, largest, total, 0)
        new_accs, new_flat = (), ()
        for group in tl.static_range(V_GROUPS):
            v_scale, v_shift = _scale_and_shift(
                v_pairs + (page * stride_vpb + place * stride_vps + tl.cast(group, tl.int64) * stride_vpg), read
            )
            v = load_tile(
                v_ptrs + (at_v + tl.cast(group * ROWS_V, tl.int64) * stride_vd), read[None, :], row_v < ROWS_V,
                EDGE or PAGED, ROWS_V != BLOCK_V,
            )  # fmt: skip
            nibbles = _nibbles(v, DTYPE, PARTS_V, LEADING)
            scaled = (p * v_scale[:, None]).to(DTYPE)
            rest = p * v_shift[:, None]
            if LEADING:  # what is taken off is what the rounded weights have added
                rest -= 16.0 * scaled.to(tl.float32)
            for part in tl.static_range(PARTS_V):
                acc = accs[group * PARTS_V + part] * correction[None, :]
                new_accs = new_accs + (tl.dot(nibbles[part], scaled, acc, input_precision=PRECISION),)  # noqa: RUF005
            new_flat = new_flat + (flat[group] * correction + tl.sum(rest, 0),)  # noqa: RUF005
        accs, flat = new_accs, new_flat
    return accs, flat, largest, total


@triton.jit
def _decode_int4_kernel(
    q_ptr, k_ptr, v_ptr, k_pairs_ptr, v_pairs_ptr, out_ptr, lse_ptr, seqlens_ptr, page_table_ptr, slopes_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_kpb, stride_kps, stride_kph, stride_kpg,
    stride_vpb, stride_vps, stride_vph, stride_vpg, stride_tb, stride_ab, stride_ah,
    batch_size, seqlen_q, capacity, nheads_q, page_size, pages, splits,
    window_left, window_right, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, LENGTHS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr, COLS_K: tl.constexpr, ROWS_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PARTS_K: tl.constexpr, PARTS_V: tl.constexpr, LEADING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As decode.py's kernel with SPLIT: out_ptr is fp32 (splits, rows of all), lse_ptr in log2 units."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    split = tl.program_id(0)
    nheads_kv = nheads_q // GROUP
    sheet = tl.program_id(1)
    kv_head = (sheet % nheads_kv).to(tl.int64)
    batch = (sheet // nheads_kv).to(tl.int64)
    first_packed = tl.program_id(2) * BLOCK_M
    packed = first_packed + tl.arange(0, BLOCK_M)
    there = packed < seqlen_q * GROUP
    row = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    row_read = tl.minimum(row, seqlen_q - 1).to(tl.int64)
    length = capacity
    if LENGTHS:
        length = tl.minimum(tl.load(seqlens_ptr + batch), capacity)
    shift = length - seqlen_q
    q_base = q_ptr + batch * stride_qb + (row_read * stride_qs + head * stride_qh)[None, :]
    col_k = tl.arange(0, BLOCK_K)[:, None]
    q_parts, q_sum = (), ()
    for group in tl.static_range(K_GROUPS):
        added = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(PARTS_K):
            feature = (PARTS_K * (group * COLS_K + col_k) + part).to(tl.int64)
            some = load_tile(q_base + feature * stride_qd, there[None, :], col_k < COLS_K, False, COLS_K != BLOCK_K)
            q_parts = q_parts + (some,)  # noqa: RUF005
            added += tl.sum(some.to(tl.float32), 0)
        q_sum = q_sum + (added,)  # noqa: RUF005
    slope = tl.zeros((1, BLOCK_M), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)[None, :]
    k_base = k_ptr + kv_head * stride_kh
    v_base = v_ptr + kv_head * stride_vh
    k_pairs = k_pairs_ptr + kv_head * stride_kph
    v_pairs = v_pairs_ptr + kv_head * stride_vph
    page_table_ptrs = page_table_ptr
    if PAGED:
        page_table_ptrs = page_table_ptr + batch * stride_tb
    else:
        k_base += batch * stride_kb
        v_base += batch * stride_vb
        k_pairs += batch * stride_kpb
        v_pairs += batch * stride_vpb
    first_row = first_packed // GROUP
    last_row = tl.minimum(first_packed + BLOCK_M - 1, seqlen_q * GROUP - 1) // GROUP
    start, inner_start, inner_end, end = split_range(
        first_row, last_row, window_left - shift, window_right + shift, length, split, splits, LEFT, RIGHT, BLOCK_N
    )
    accs, flat = (), ()
    for _ in tl.static_range(V_GROUPS):
        for _ in tl.static_range(PARTS_V):
            accs = accs + (tl.zeros((BLOCK_V, BLOCK_M), tl.float32),)  # noqa: RUF005
        flat = flat + (tl.zeros((BLOCK_M,), tl.float32),)  # noqa: RUF005
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Before the inner blocks (only a window has such), those, and after them.
    for part in tl.static_range(0 if LEFT else 1, 3):
        first, last = part_of(part, start, inner_start, inner_end, end, end)
        accs, flat, largest, total = _attend(
            q_parts, q_sum, accs, flat, largest, total, k_base, v_base, k_pairs, v_pairs, page_table_ptrs,
            first, last, length, stride_kb, stride_ks, stride_kd, stride_vb, stride_vs, stride_vd,
            stride_kpb, stride_kps, stride_kpg, stride_vpb, stride_vps, stride_vpg, page_size, pages, row,
            slope, shift, window_left, window_right, scale, softcap,
            part != 1, LEFT, RIGHT, SOFTCAP, ALIBI, PAGED, PAGE_SIZE, K_GROUPS, V_GROUPS, COLS_K, ROWS_V, BLOCK_K,
            BLOCK_V, PARTS_K, PARTS_V, DTYPE, LEADING, PRECISION, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    empty = total == 0.0
    top = tl.where(largest == -float("inf"), 0.0, largest)
    weight = 1.0 / tl.where(empty, 1.0, total)
    at = split.to(tl.int64) * batch_size * seqlen_q * nheads_q + (batch * seqlen_q + row) * nheads_q + head
    tl.store(lse_ptr + at, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=there)
    row_v = tl.arange(0, BLOCK_V)[:, None]
    mask = there[None, :] & (row_v < ROWS_V)
    for group in tl.static_range(V_GROUPS):
        for part in tl.static_range(PARTS_V):
            out_ptrs = out_ptr + at[None, :] * HEAD_DIM_V + PARTS_V * (group * ROWS_V + row_v) + part
            out = (accs[group * PARTS_V + part] * (16.0 if LEADING else 1.0) + flat[group][None, :]) * weight[None, :]
            tl.store(out_ptrs, out, mask=mask)


_decode_int4 = Launcher(_decode_int4_kernel)


def run(
    grid: tuple[int, int, int], stored: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], others: tuple[Any, ...],
    numbers: tuple[Any, ...], options: dict[str, Any], cut: dict[str, Any], num_warps: int,
) -> None:  # fmt: skip
    """The splits' results. `stored`: q, the caches and their pairs; the rest are the kernel's own arguments."""
    q, k_cache, v_cache, k_pairs, v_pairs = stored
    k_words, v_words = _words(k_pairs), _words(v_pairs)
    k_cache, k_parts = _four_at_once(k_cache, k_words.shape[3])
    v_cache, v_parts = _four_at_once(v_cache, v_words.shape[3])
    strides = (*q.stride(), *k_cache.stride(), *v_cache.stride(), *k_words.stride()[:4], *v_words.stride()[:4])
    _decode_int4.launch(
        grid,
        q.device,
        (q, k_cache, v_cache, k_words, v_words, *others, *strides, *numbers),
        {
            **options,
            **_constants(k_cache, v_cache, k_words, v_words),
            "PARTS_K": k_parts,
            "PARTS_V": v_parts,
            "LEADING": q.itemsize == 2 and device.arch(q).startswith("sm_"),
            **cut,
        },
        num_warps=num_warps,
    )


def _words(pairs: Tensor) -> Tensor:
    """fp16 (..., groups, 2) as int32 (..., groups, 1), a load for each pair; copied where they do not lie so."""
    *strides, last = pairs.stride()
    if last != 1 or any(stride % 2 for stride in strides) or pairs.storage_offset() % 2 or pairs.data_ptr() % 4:
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return pairs.view(torch.int32)


def _four_at_once(cache: Tensor, groups: int) -> tuple[Tensor, int]:
    """A cache by 16-bit words of 4 features where it lies so, else by its bytes of 2; and that number."""
    words = as_words(cache, groups)
    return (cache, 2) if words is None else (words, 4)


def _constants(k_cache: Tensor, v_cache: Tensor, k_pairs: Tensor, v_pairs: Tensor) -> dict[str, int]:
    """Groups of features, the words or bytes of each, and the blocks that hold those."""
    k_groups, v_groups = k_pairs.shape[3], v_pairs.shape[3]
    k_columns, v_rows = k_cache.shape[3] // k_groups, v_cache.shape[3] // v_groups
    return {
        "K_GROUPS": k_groups,
        "V_GROUPS": v_groups,
        "COLS_K": k_columns,
        "ROWS_V": v_rows,
        "BLOCK_K": block_of(k_columns),
        "BLOCK_V": block_of(v_rows),
    }
