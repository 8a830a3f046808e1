"""attention_decode over int4 caches: nibbles go into matrix products as they are, scales and shifts follow outside.

With a key's features as nibble * scale + shift, four of them in a 16-bit word, the first in its lowest bits:

    q . k       =  scale (q_0 . n_0 + q_1 . n_1 + q_2 . n_2 + q_3 . n_3) + shift sum(q)
    (p v)_part  =  (p scale) n_part - 7.5 sum(p scale) + sum(p (shift + 7.5 scale))

where n_part is the part's nibble of every word and q_part is every fourth feature of q. So nothing is shuffled:
products of a quarter of the depth, outputs of a quarter of the width; and 16-bit words are what the hardware transposes
for its matrix instructions. Caches that do not lie so are read by bytes, with two parts.

A nibble becomes a bf16 or an fp16 by a mask. The bits 0 to 7 of either read as a whole number of its least subnormal
number, whether they fill the mantissa or reach into the exponent, and the matrix instructions of NVIDIA GPUs keep
subnormal numbers: n in bits 4 to 7 is 16 times what it is in bits 0 to 3. What is multiplied with them is made large by
a power of two, so that the products are ordinary numbers of fp32.

A matrix instruction adds its products down to some 25 bits below the largest, whose size it takes from the exponents: a
subnormal number counts as the least normal one. That is 128 times the unit of bf16, whose short products still fit; but
1024 times that of fp16, which would cost a score 2e-6 with nibbles in bits 0 to 3. So fp16 has all of them in bits 4 to
7, which takes two shifts more.

p scale is rounded for its product. 7.5 times the sum of what it was rounded to, which comes from a product with ones,
is taken off again: so what the rounding takes falls on values around 0, as in attention over other caches, and not on
nibbles, which are all positive; weights that are nearly alike are all rounded the same way. In fp16 it is p scale over
the largest scale's power of two, so that caches of small values lose no digits either. Nibbles that become numbers
before their products (fp32, AMD) become n - 7.5, which is exact, and nothing is taken off at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core import device
from onepass.core.triton_backend import Launcher, aligned, is_hopper_or_newer
from onepass.core.triton_functions import let_next_begin, prefetch
from onepass.ops.attention.triton.problem import as_words, block_of
from onepass.ops.attention.triton.tile import (
    LOG2_E,
    adjusted_scores,
    decode_place,
    lies_in_one,
    load_tile,
    page_entries,
    part_of,
    placed,
    power_of,
    softmax_step,
    split_range,
    visible,
)


@triton.constexpr_function
def _shift(unit):
    """By how many bits the first nibble is moved."""
    return 4 if unit == 16 else 0


@triton.constexpr_function
def _words_asm(unit):
    """Nibbles of two 16-bit words to the words that hold them in bits 0 to 7, two in a register."""
    return f"""{{
.reg .b32 s, t, u;
shl.b32 s, $4, {_shift(unit)};
shr.b32 t, s, 8;
shr.b32 u, $4, 8;
and.b32 $0, s, {0x000F000F * unit};
and.b32 $1, $4, 0x00f000f0;
and.b32 $2, t, {0x000F000F * unit};
and.b32 $3, u, 0x00f000f0;
}}"""


@triton.constexpr_function
def _bytes_asm(unit):
    """The same of four bytes."""
    return f"""{{
.reg .b32 a, b, s, t;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shl.b32 s, a, {_shift(unit)};
shl.b32 t, b, {_shift(unit)};
and.b32 $0, s, {0x000F000F * unit};
and.b32 $1, t, {0x000F000F * unit};
and.b32 $2, a, 0x00f000f0;
and.b32 $3, b, 0x00f000f0;
}}"""


MIDDLE: tl.constexpr = tl.constexpr(7.5)
LARGEST_POWER: tl.constexpr = tl.constexpr(2.0**15)  # of fp16
LIKE_ROWS: tl.constexpr = tl.constexpr(16)  # the fewest of a matrix instruction


@triton.constexpr_function
def _place(unit, part):
    """What a part's nibbles are multiplied with to be like the first part's."""
    return 1 / 16 if unit == 1 and part % 2 else 1.0


@triton.jit
def _nibbles(x, dtype: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, NVIDIA: tl.constexpr):
    """The parts of words (4) or bytes (2), lowest bits first: n - 7.5, or as bits, where the first part's 1 is UNIT."""
    if not UNIT:
        a, b = (x & 15).to(dtype) - MIDDLE, ((x >> 4) & 15).to(dtype) - MIDDLE
        if PARTS == 4:
            return a, b, ((x >> 8) & 15).to(dtype) - MIDDLE, ((x >> 12) & 15).to(dtype) - MIDDLE
        else:
            return a, b
    elif PARTS == 4:
        if NVIDIA:
            a, b, c, d = tl.inline_asm_elementwise(
                _words_asm(UNIT), "=r,=r,=r,=r,r", [x], dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            a, b, c, d = (x & 15) * UNIT, x & 0xF0, ((x >> 8) & 15) * UNIT, (x >> 8) & 0xF0
        return (
            a.to(dtype, bitcast=True), b.to(dtype, bitcast=True), c.to(dtype, bitcast=True), d.to(dtype, bitcast=True)
        )  # fmt: skip
    else:
        if NVIDIA:
            a, b = tl.inline_asm_elementwise(
                _bytes_asm(UNIT), "=r,=r,=r,=r,r", [x], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
            )
        else:
            a, b = (x & 15).to(tl.int16) * UNIT, (x & 0xF0).to(tl.int16)
        return a.to(dtype, bitcast=True), b.to(dtype, bitcast=True)


@triton.jit
def _scale_and_shift(ptrs, there):
    """fp32 scales and shifts of keys, from words that hold two fp16."""
    word = tl.load(ptrs, mask=there, other=0)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    shift = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, shift


@triton.jit
def _prefetch_share(sheet, first, stride_s, kv_head, inside, ROW: tl.constexpr, KEYS: tl.constexpr):
    """One head's share of all heads' KEYS keys from `first` on, if those are `inside`. ROW: words or bytes of a head.

    A head's own part of a key is 64 bytes at head_dim 128; memory gives such pieces at 0.6 of its speed, and what the
    programs of all heads, which run at the same time, ask for together at nearly all of it.
    """
    BYTES: tl.constexpr = KEYS * ROW * (sheet.dtype.element_ty.primitive_bitwidth // 8)
    ptr = sheet + (tl.cast(first, tl.int64) * stride_s + kv_head * (KEYS * ROW))
    prefetch(ptr, tl.where(inside, BYTES, 0))


@triton.jit
def _prefetch_block(
    k_sheet, v_sheet, first, end, stride_ks, stride_vs, kv_head,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This head's share of the keys and values of a whole block before `end`."""
    inside = first + BLOCK_N <= end
    _prefetch_share(k_sheet, first, stride_ks, kv_head, inside, K_ROW, BLOCK_N)
    _prefetch_share(v_sheet, first, stride_vs, kv_head, inside, V_ROW, BLOCK_N)


@triton.jit
def _attend(
    q_parts, q_sum, accs, weights, flat, tops, largest, total, k_base, v_base, k_pairs, v_pairs, page_table_ptrs,
    start, end, length, stride_kb, stride_ks, stride_kd, stride_vb, stride_vs, stride_vd,
    stride_kpb, stride_kps, stride_kpg, stride_vpb, stride_vps, stride_vpg, page_size, pages, row,
    slope, shift, window_left, window_right, scale, q_power, softcap, kv_head, k_sheet, v_sheet,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    COLS_K: tl.constexpr, ROWS_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PARTS_K: tl.constexpr, PARTS_V: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    P_LIFT: tl.constexpr, NVIDIA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The keys from start to end; in EDGE blocks some are unseen, or are not stored.

    COLS_K, ROWS_V: words or bytes of a group. weights: with UNIT what nibbles are multiplied with, summed; its rows
    are alike. flat: what the middles of values add. tops: with NARROW the largest scales of values so far, in units of
    whose powers of two accs and weights are. q_parts and q_sum are of queries / q_power, the products of q_parts in
    units of 1 / K_UNIT.
    """
    ADJUSTED: tl.constexpr = SOFTCAP or ALIBI
    NARROW: tl.constexpr = DTYPE.is_fp16()
    col_k = tl.arange(0, BLOCK_K)[None, :]
    row_v = tl.arange(0, BLOCK_V)[:, None]
    lane = tl.arange(0, BLOCK_N)
    if UNIT:
        units = tl.full((LIKE_ROWS, BLOCK_N), UNIT, tl.int16).to(DTYPE, bitcast=True)
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
        if TOGETHER:
            _prefetch_block(
                k_sheet, v_sheet, first + BLOCK_N, end, stride_ks, stride_vs, kv_head,
                K_GROUPS * COLS_K, V_GROUPS * ROWS_V, BLOCK_N,
            )  # fmt: skip
        key = first + lane
        there = key < length if EDGE else tl.full((BLOCK_N,), 1, tl.int1)
        read = there
        at = first if IN_ONE else key
        page, place = tl.zeros_like(at), at
        if PAGED:
            page, place, exists = placed(next_page, at, page_size, pages)
            next_page = page_entries(page_table_ptrs, at + BLOCK_N, length, page_size)
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
            if not UNIT:
                k_shift += MIDDLE * k_scale
            nibbles = _nibbles(k, DTYPE, PARTS_K, UNIT, NVIDIA)
            product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.static_range(PARTS_K):
                product = tl.dot(nibbles[part], q_parts[group * PARTS_K + part], product, input_precision=PRECISION)
            if not SOFTCAP:  # once a key in place of once a score
                k_scale, k_shift = k_scale * scale, k_shift * scale
            s += product * (k_scale * K_UNIT)[:, None] + k_shift[:, None] * q_sum[group][None, :]
        if ADJUSTED:
            s, _ = adjusted_scores(
                s * q_power[None, :], key[:, None], row[None, :], first - shift, -shift, scale if SOFTCAP else 1.0,
                softcap, slope, 0.0, SOFTCAP, ALIBI, False,
            )  # fmt: skip
        if PAGED:  # a page that does not exist is not read, and shows as NaN
            s = tl.where((there & ~exists)[:, None], float("nan"), s)
        if EDGE:
            seen = there[:, None]
            if LEFT or RIGHT:
                seen = seen & visible(row[None, :], key[:, None], shift, window_left, window_right, LEFT, RIGHT)
            s = tl.where(seen, s, -float("inf"))
        p, correction, largest, total = softmax_step(
            s, LOG2_E if ADJUSTED else LOG2_E * q_power, largest, total, 0, False
        )
        new_accs, new_weights, new_flat, new_tops = (), (), (), ()
        for group in tl.static_range(V_GROUPS):
            v_scale, v_shift = _scale_and_shift(
                v_pairs + (page * stride_vpb + place * stride_vps + tl.cast(group, tl.int64) * stride_vpg), read
            )
            v = load_tile(
                v_ptrs + (at_v + tl.cast(group * ROWS_V, tl.int64) * stride_vd), read[None, :], row_v < ROWS_V,
                EDGE or PAGED, ROWS_V != BLOCK_V,
            )  # fmt: skip
            nibbles = _nibbles(v, DTYPE, PARTS_V, UNIT, NVIDIA)
            kept, lift = correction, P_LIFT
            if NARROW:
                top = tl.maximum(tops[group], tl.minimum(tl.max(tl.abs(v_scale), 0), LARGEST_POWER))
                power = power_of(top)
                kept, lift = correction * (power_of(tops[group]) / power), P_LIFT / power
                new_tops = new_tops + (top,)  # noqa: RUF005
            scaled = (p * (v_scale * lift)[:, None]).to(DTYPE)
            for part in tl.static_range(PARTS_V):
                acc = accs[group * PARTS_V + part] * kept[None, :]
                new_accs = new_accs + (tl.dot(nibbles[part], scaled, acc, input_precision=PRECISION),)  # noqa: RUF005
            if UNIT:
                acc = weights[group] * kept[None, :]
                new_weights = new_weights + (tl.dot(units, scaled, acc),)  # noqa: RUF005
            centre = v_shift + MIDDLE * v_scale
            new_flat = new_flat + (flat[group] * correction + tl.sum(p * centre[:, None], 0),)  # noqa: RUF005
        accs, weights, flat, tops = new_accs, new_weights, new_flat, new_tops
    return accs, weights, flat, tops, largest, total


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
    PARTS_K: tl.constexpr, PARTS_V: tl.constexpr, UNIT: tl.constexpr, LEAST: tl.constexpr, Q_LIFT: tl.constexpr,
    P_LIFT: tl.constexpr, NVIDIA: tl.constexpr, FOLLOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """As decode.py's kernel with SPLIT: out_ptr is fp32 (splits, rows of all), lse_ptr in log2 units.

    UNIT: the bits of the first part's nibble of 1 as operand, and LEAST that number; 0 and 1 where nibbles become
    numbers. Q_LIFT, P_LIFT: by what the other operands are multiplied for it.
    TOGETHER: all heads lie side by side, and their programs ask for the next block together before they read it.
    """
    if FOLLOWED:
        let_next_begin()
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    split = tl.program_id(1)
    kv_head, batch, first_packed = decode_place(nheads_q // GROUP, seqlen_q * GROUP, BLOCK_M)
    packed = first_packed + tl.arange(0, BLOCK_M)
    there = packed < seqlen_q * GROUP
    row = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    row_read = tl.minimum(row, seqlen_q - 1).to(tl.int64)
    length = capacity
    if LENGTHS:
        length = tl.minimum(tl.load(seqlens_ptr + batch), capacity)
    shift = length - seqlen_q
    first_row = first_packed // GROUP
    last_row = tl.minimum(first_packed + BLOCK_M - 1, seqlen_q * GROUP - 1) // GROUP
    start, inner_start, inner_end, end = split_range(
        first_row, last_row, window_left - shift, window_right + shift, length, split, splits, LEFT, RIGHT, BLOCK_N
    )
    page_table_ptrs = page_table_ptr
    k_sheet, v_sheet, k_pairs_sheet, v_pairs_sheet = k_ptr, v_ptr, k_pairs_ptr, v_pairs_ptr
    if PAGED:
        page_table_ptrs = page_table_ptr + batch * stride_tb
    else:
        k_sheet += batch * stride_kb
        v_sheet += batch * stride_vb
        k_pairs_sheet += batch * stride_kpb
        v_pairs_sheet += batch * stride_vpb
    if TOGETHER:
        _prefetch_block(
            k_sheet, v_sheet, start, end, stride_ks, stride_vs, kv_head,
            K_GROUPS * COLS_K, V_GROUPS * ROWS_V, BLOCK_N,
        )  # fmt: skip
    q_base = q_ptr + batch * stride_qb + (row_read * stride_qs + head * stride_qh)[None, :]
    col_k = tl.arange(0, BLOCK_K)[:, None]
    q_tiles, largest_q = (), tl.zeros((BLOCK_M,), tl.float32)
    for group in tl.static_range(K_GROUPS):
        for part in tl.static_range(PARTS_K):
            feature = (PARTS_K * (group * COLS_K + col_k) + part).to(tl.int64)
            some = load_tile(q_base + feature * stride_qd, there[None, :], col_k < COLS_K, False, COLS_K != BLOCK_K)
            q_tiles = q_tiles + (some.to(tl.float32),)  # noqa: RUF005
            largest_q = tl.maximum(largest_q, tl.max(tl.abs(some.to(tl.float32)), 0))
    q_power = power_of(largest_q) if UNIT else tl.full((BLOCK_M,), 1.0, tl.float32)
    q_parts, q_sum = (), ()
    for group in tl.static_range(K_GROUPS):
        added = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(PARTS_K):
            some = q_tiles[group * PARTS_K + part] / q_power[None, :]
            added += tl.sum(some, 0)
            q_parts = q_parts + ((some * (Q_LIFT * _place(UNIT, part))).to(DTYPE),)  # noqa: RUF005
        q_sum = q_sum + (added,)  # noqa: RUF005
    slope = tl.zeros((1, BLOCK_M), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)[None, :]
    NARROW: tl.constexpr = DTYPE.is_fp16()
    accs, weights, flat, tops = (), (), (), ()
    for _ in tl.static_range(V_GROUPS):
        for _ in tl.static_range(PARTS_V):
            accs = accs + (tl.zeros((BLOCK_V, BLOCK_M), tl.float32),)  # noqa: RUF005
        if UNIT:
            weights = weights + (tl.zeros((LIKE_ROWS, BLOCK_M), tl.float32),)  # noqa: RUF005
        flat = flat + (tl.zeros((BLOCK_M,), tl.float32),)  # noqa: RUF005
        if NARROW:
            tops = tops + (tl.full((), 0.0, tl.float32),)  # noqa: RUF005
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Before the inner blocks (only a window has such), those, and after them.
    for part in tl.static_range(0 if LEFT else 1, 3):
        first, last = part_of(part, start, inner_start, inner_end, end, end)
        accs, weights, flat, tops, largest, total = _attend(
            q_parts, q_sum, accs, weights, flat, tops, largest, total,
            k_sheet + kv_head * stride_kh, v_sheet + kv_head * stride_vh,
            k_pairs_sheet + kv_head * stride_kph, v_pairs_sheet + kv_head * stride_vph, page_table_ptrs,
            first, last, length, stride_kb, stride_ks, stride_kd, stride_vb, stride_vs, stride_vd,
            stride_kpb, stride_kps, stride_kpg, stride_vpb, stride_vps, stride_vpg, page_size, pages, row,
            slope, shift, window_left, window_right, scale, q_power, softcap, kv_head, k_sheet, v_sheet,
            part != 1, LEFT, RIGHT, SOFTCAP, ALIBI, PAGED, PAGE_SIZE, K_GROUPS, V_GROUPS, COLS_K, ROWS_V, BLOCK_K,
            BLOCK_V, PARTS_K, PARTS_V, DTYPE, UNIT, 1.0 / (LEAST * Q_LIFT), P_LIFT, NVIDIA,
            PRECISION, BLOCK_M, BLOCK_N, STAGES, TOGETHER,
        )  # fmt: skip
    empty = total == 0.0
    top = tl.where(largest == -float("inf"), 0.0, largest)
    weight = 1.0 / tl.where(empty, 1.0, total)
    at = split.to(tl.int64) * batch_size * seqlen_q * nheads_q + (batch * seqlen_q + row) * nheads_q + head
    tl.store(lse_ptr + at, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=there)
    row_v = tl.arange(0, BLOCK_V)[:, None]
    mask = there[None, :] & (row_v < ROWS_V)
    for group in tl.static_range(V_GROUPS):
        middle = tl.cast(flat[group], tl.float32)  # for type checkers: the tuple began empty
        unit = (power_of(tops[group]) if NARROW else 1.0) / (LEAST * P_LIFT)
        if UNIT:
            middle -= tl.max(weights[group], 0) * (MIDDLE * unit)
        for part in tl.static_range(PARTS_V):
            out_ptrs = out_ptr + at[None, :] * HEAD_DIM_V + PARTS_V * (group * ROWS_V + row_v) + part
            acc = accs[group * PARTS_V + part] * (_place(UNIT, part) * unit)
            out = (acc + middle[None, :]) * weight[None, :]
            tl.store(out_ptrs, out, mask=mask)


_decode_int4 = Launcher(_decode_int4_kernel)
# By q's dtype: the bits of the first part's nibble of 1, that number, by what queries below 2 are multiplied, and by
# what weights times scales, in fp16 below 2 as well: products with it are then ordinary numbers of fp32.
_AS_BITS = {torch.bfloat16: (1, 2.0**-133, 2.0**120, 2.0**100), torch.float16: (16, 2.0**-20, 2.0**14, 2.0**14)}
_AS_NUMBERS = (0, 1.0, 1.0, 1.0)


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
            **_operands(q),
            **cut,
            "TOGETHER": not options["PAGED"] and _side_by_side(k_cache, v_cache),
        },
        num_warps=num_warps,
    )


def _operands(q: Tensor) -> dict[str, Any]:
    """How nibbles become operands beside q's dtype: as they lie where subnormal numbers are kept, else as numbers."""
    arch = device.arch(q)
    as_bits = q.itemsize == 2 and not arch.startswith("gfx")
    unit, least, q_lift, p_lift = _AS_BITS[q.dtype] if as_bits else _AS_NUMBERS
    return {"UNIT": unit, "LEAST": least, "Q_LIFT": q_lift, "P_LIFT": p_lift, "NVIDIA": arch.startswith("sm_")}


def _side_by_side(*caches: Tensor) -> bool:
    """Whether the heads of a key lie one after the other in each cache, and the keys; where that can be prefetched."""
    return (
        is_hopper_or_newer(device.arch(caches[0]))
        and caches[0].shape[2] > 1
        and all(
            x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1)
            and aligned(x.data_ptr(), x.stride(0) * x.itemsize)
            for x in caches
        )
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
