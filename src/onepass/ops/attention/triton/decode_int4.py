"""attention_decode over int4 caches: nibbles go into matrix products as they are, scales and shifts follow outside.

With a key's features as nibble * scale + shift, even ones in the low nibbles of its bytes and odd ones in the high:

    q . k  =  scale (q_even . low + q_odd . high) + shift sum(q)
    p v    =  (p scale) low, (p scale) high as even and odd features, + sum(p shift)

so that nothing is shuffled: products of half the depth, two outputs of half the width. V is read by 16-bit words of
four features where it can be, for four outputs of a quarter: the hardware transposes those for its matrix instructions,
and not bytes. A nibble's bits in a 16-bit number make 128 + n (bf16) or 1024 + n (fp16), one bit operation for two of
them. For keys what that adds is taken off at once, since scores are wanted to fp32's precision; for values with the
shifts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core import device
from onepass.core.triton_backend import Launcher
from onepass.ops.attention.triton.problem import block_of
from onepass.ops.attention.triton.tile import LOG2_E, adjusted_scores, load_tile, split_range, visible

# Four bytes to the low nibbles of all four and the high ones, with what is added to each (128, 1024) or without.
_BF16_ASM: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, c, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, d, 0x000f000f, 0x43004300, 0xea;
}""")
_BF16_EXACT_ASM: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, c, d, one, less;
mov.b32 one, 0x3f803f80;
mov.b32 less, 0xc300c300;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, a, one, less;
lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $1, b, one, less;
lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $2, c, one, less;
lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $3, d, one, less;
}""")
_FP16_ASM: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, b, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $2, c, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, d, 0x000f000f, 0x64006400, 0xea;
}""")
_FP16_EXACT_ASM: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, c, d, less;
mov.b32 less, 0xe400e400;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea;
add.rn.f16x2 $0, a, less;
lop3.b32 b, b, 0x000f000f, 0x64006400, 0xea;
add.rn.f16x2 $1, b, less;
lop3.b32 c, c, 0x000f000f, 0x64006400, 0xea;
add.rn.f16x2 $2, c, less;
lop3.b32 d, d, 0x000f000f, 0x64006400, 0xea;
add.rn.f16x2 $3, d, less;
}""")

# The same of 16-bit words, four nibbles each.
_BF16_WORDS_ASM: tl.constexpr = tl.constexpr("""{
.reg .b32 a;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 a, $4, 4;
lop3.b32 $1, a, 0x000f000f, 0x43004300, 0xea;
shr.u32 a, $4, 8;
lop3.b32 $2, a, 0x000f000f, 0x43004300, 0xea;
shr.u32 a, $4, 12;
lop3.b32 $3, a, 0x000f000f, 0x43004300, 0xea;
}""")
_FP16_WORDS_ASM: tl.constexpr = tl.constexpr("""{
.reg .b32 a;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
shr.u32 a, $4, 4;
lop3.b32 $1, a, 0x000f000f, 0x64006400, 0xea;
shr.u32 a, $4, 8;
lop3.b32 $2, a, 0x000f000f, 0x64006400, 0xea;
shr.u32 a, $4, 12;
lop3.b32 $3, a, 0x000f000f, 0x64006400, 0xea;
}""")


@triton.jit
def _word_nibbles(x, DTYPE: tl.constexpr, ADDED: tl.constexpr):
    """The four nibbles of 16-bit words, the lowest first, as numbers of a dtype, ADDED to each."""
    if ADDED == 128:
        return tl.inline_asm_elementwise(
            _BF16_WORDS_ASM, "=r,=r,=r,=r,r", [x],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif ADDED == 1024:
        return tl.inline_asm_elementwise(
            _FP16_WORDS_ASM, "=r,=r,=r,=r,r", [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (x & 15).to(DTYPE), ((x >> 4) & 15).to(DTYPE), ((x >> 8) & 15).to(DTYPE), ((x >> 12) & 15).to(DTYPE)


@triton.jit
def _nibbles(x, DTYPE: tl.constexpr, ADDED: tl.constexpr, EXACT: tl.constexpr):
    """The low and the high nibbles of bytes as numbers of a dtype; ADDED to each, unless EXACT."""
    if ADDED == 128:
        BF16: tl.constexpr = _BF16_EXACT_ASM if EXACT else _BF16_ASM
        return tl.inline_asm_elementwise(
            BF16, "=r,=r,=r,=r,r", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif ADDED == 1024:
        FP16: tl.constexpr = _FP16_EXACT_ASM if EXACT else _FP16_ASM
        return tl.inline_asm_elementwise(
            FP16, "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return (x & 15).to(DTYPE), (x >> 4).to(DTYPE)


@triton.jit
def _scale_and_shift(ptrs, there):
    """fp32 scales and shifts of keys, from words that hold two fp16."""
    word = tl.load(ptrs, mask=there, other=0)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    shift = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), shift.to(tl.float32)


@triton.jit
def _attend(
    q_even, q_odd, q_sum, accs, flat, largest, total, k_base, v_base, k_pairs, v_pairs, page_table_ptrs,
    start, end, length, stride_kb, stride_ks, stride_kd, stride_vb, stride_vs, stride_vd,
    stride_kpb, stride_kps, stride_kpg, stride_vpb, stride_vps, stride_vpg, page_size, pages, row,
    slope, shift, window_left, window_right, scale, softcap,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    K_BYTES: tl.constexpr, COLS_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr,
    DTYPE: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The keys from start to end; in EDGE blocks some are unseen, or are not stored.

    K_BYTES: of a group. COLS_V: of a group, bytes of 2 or words of 4 PARTS, each part with an accumulator.
    """
    byte = tl.arange(0, BLOCK_K)[:, None]
    col_v = tl.arange(0, BLOCK_V)[None, :]
    lane = tl.arange(0, BLOCK_N)
    if PAGE_SIZE:
        page_size = PAGE_SIZE
    if PAGED:  # the pages of the next block are found while this one is worked on
        last = tl.minimum(end, length)
        next_page = tl.load(page_table_ptrs + (start + lane) // page_size, mask=start + lane < last, other=0)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        key = first + lane
        there = key < length
        read = there
        page, place = tl.zeros((BLOCK_N,), tl.int64), key.to(tl.int64)
        if PAGED:
            exists = (next_page >= 0) & (next_page < pages)
            page, place = next_page.to(tl.int64), (key % page_size).to(tl.int64)
            following = key + BLOCK_N
            next_page = tl.load(page_table_ptrs + following // page_size, mask=following < last, other=0)
            read = there & exists
        at_k = page * stride_kb + place * stride_ks
        at_v = page * stride_vb + place * stride_vs
        s = tl.zeros((largest.shape[0], BLOCK_N), tl.float32)
        for group in tl.static_range(K_GROUPS):
            k_scale, k_shift = _scale_and_shift(
                k_pairs + page * stride_kpb + place * stride_kps + group * stride_kpg, read
            )
            k = load_tile(
                k_base + at_k[None, :] + (group * K_BYTES + byte).to(tl.int64) * stride_kd, read[None, :],
                byte < K_BYTES, EDGE or PAGED, K_BYTES != BLOCK_K,
            )  # fmt: skip
            low, high = _nibbles(k, DTYPE, ADDED, True)
            product = tl.dot(q_even[group], low, input_precision=PRECISION)
            product = tl.dot(q_odd[group], high, product, input_precision=PRECISION)
            s += product * k_scale[None, :] + k_shift[None, :] * q_sum[group][:, None]
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
        before = largest
        largest = tl.maximum(largest, tl.max(s, 1) * LOG2_E)
        top = tl.where(largest == -float("inf"), 0.0, largest)
        p = tl.exp2(s * LOG2_E - top[:, None])
        correction = tl.exp2(before - top)
        total = total * correction + tl.sum(p, 1)
        new_accs, new_flat = (), ()
        for group in tl.static_range(V_GROUPS):
            v_scale, v_shift = _scale_and_shift(
                v_pairs + page * stride_vpb + place * stride_vps + group * stride_vpg, read
            )
            v = load_tile(
                v_base + at_v[:, None] + (group * COLS_V + col_v).to(tl.int64) * stride_vd, read[:, None],
                col_v < COLS_V, EDGE or PAGED, COLS_V != BLOCK_V,
            )  # fmt: skip
            if PARTS == 4:
                nibbles = _word_nibbles(v, DTYPE, ADDED)
            else:
                nibbles = _nibbles(v, DTYPE, ADDED, False)
            scaled = (p * v_scale[None, :]).to(DTYPE)
            rest = tl.sum(p * v_shift[None, :] - ADDED * scaled.to(tl.float32), 1)
            for part in tl.static_range(PARTS):
                acc = accs[group * PARTS + part] * correction[:, None]
                new_accs = new_accs + (tl.dot(scaled, nibbles[part], acc, input_precision=PRECISION),)  # noqa: RUF005
            new_flat = new_flat + (flat[group] * correction + rest,)  # noqa: RUF005
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
    V_GROUPS: tl.constexpr, K_BYTES: tl.constexpr, COLS_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
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
    q_base = q_ptr + batch * stride_qb + (row_read * stride_qs + head * stride_qh)[:, None]
    byte = tl.arange(0, BLOCK_K)[None, :]
    q_even, q_odd, q_sum = (), (), ()
    for group in tl.static_range(K_GROUPS):
        feature = 2 * (group * K_BYTES + byte).to(tl.int64)
        one = load_tile(q_base + feature * stride_qd, there[:, None], byte < K_BYTES, False, K_BYTES != BLOCK_K)
        other = load_tile(q_base + (feature + 1) * stride_qd, there[:, None], byte < K_BYTES, False, K_BYTES != BLOCK_K)
        q_even, q_odd = q_even + (one,), q_odd + (other,)  # noqa: RUF005
        q_sum = q_sum + (tl.sum(one.to(tl.float32), 1) + tl.sum(other.to(tl.float32), 1),)  # noqa: RUF005
    slope = tl.zeros((BLOCK_M, 1), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)[:, None]
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
        for _ in tl.static_range(PARTS):
            accs = accs + (tl.zeros((BLOCK_M, BLOCK_V), tl.float32),)  # noqa: RUF005
        flat = flat + (tl.zeros((BLOCK_M,), tl.float32),)  # noqa: RUF005
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Before the inner blocks (only a window has such), those, and after them.
    for part in tl.static_range(0 if LEFT else 1, 3):
        first = start if part == 0 else inner_start if part == 1 else inner_end
        last = inner_start if part == 0 else inner_end if part == 1 else end
        accs, flat, largest, total = _attend(
            q_even, q_odd, q_sum, accs, flat, largest, total, k_base, v_base, k_pairs, v_pairs, page_table_ptrs,
            first, last, length, stride_kb, stride_ks, stride_kd, stride_vb, stride_vs, stride_vd,
            stride_kpb, stride_kps, stride_kpg, stride_vpb, stride_vps, stride_vpg, page_size, pages, row,
            slope, shift, window_left, window_right, scale, softcap,
            part != 1, LEFT, RIGHT, SOFTCAP, ALIBI, PAGED, PAGE_SIZE, K_GROUPS, V_GROUPS, K_BYTES, COLS_V, BLOCK_K,
            BLOCK_V, PARTS, DTYPE, ADDED, PRECISION, BLOCK_N, STAGES,
        )  # fmt: skip
    empty = total == 0.0
    top = tl.where(largest == -float("inf"), 0.0, largest)
    weight = 1.0 / tl.where(empty, 1.0, total)
    at = split.to(tl.int64) * batch_size * seqlen_q * nheads_q + (batch * seqlen_q + row) * nheads_q + head
    tl.store(lse_ptr + at, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=there)
    col_v = tl.arange(0, BLOCK_V)[None, :]
    mask = there[:, None] & (col_v < COLS_V)
    for group in tl.static_range(V_GROUPS):
        for part in tl.static_range(PARTS):
            out_ptrs = out_ptr + at[:, None] * HEAD_DIM_V + PARTS * (group * COLS_V + col_v) + part
            out = (accs[group * PARTS + part] + flat[group][:, None]) * weight[:, None]
            tl.store(out_ptrs, out, mask=mask)


# Where a nibble's bits are the last ones of the number.
_ADDED = {torch.bfloat16: 128, torch.float16: 1024}

_decode_int4 = Launcher(_decode_int4_kernel)


def run(
    grid: tuple[int, int, int], stored: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], others: tuple[Any, ...],
    numbers: tuple[Any, ...], options: dict[str, Any], cut: dict[str, Any], num_warps: int,
) -> None:  # fmt: skip
    """The splits' results. `stored`: q, the caches and their pairs; the rest are the kernel's own arguments."""
    q, k_cache, v_cache, k_pairs, v_pairs = stored
    k_words, v_words = _words(k_pairs), _words(v_pairs)
    v_cache, parts = _four_at_once(v_cache, v_words.shape[3])
    strides = (*q.stride(), *k_cache.stride(), *v_cache.stride(), *k_words.stride()[:4], *v_words.stride()[:4])
    _decode_int4.launch(
        grid,
        q.device,
        (q, k_cache, v_cache, k_words, v_words, *others, *strides, *numbers),
        {**options, **_constants(q, k_cache, v_cache, k_words, v_words), "PARTS": parts, **_added(q), **cut},
        num_warps=num_warps,
    )


def _words(pairs: Tensor) -> Tensor:
    """fp16 (..., groups, 2) as int32 (..., groups, 1), a load for each pair; copied where they do not lie so."""
    *strides, last = pairs.stride()
    if last != 1 or any(stride % 2 for stride in strides) or pairs.storage_offset() % 2 or pairs.data_ptr() % 4:
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return pairs.view(torch.int32)


def _four_at_once(v_cache: Tensor, groups: int) -> tuple[Tensor, int]:
    """v_cache by 16-bit words of 4 features where it lies so, else by its bytes of 2; and that number."""
    *strides, last = v_cache.stride()
    numbers = (v_cache.shape[3] // groups, v_cache.storage_offset(), v_cache.data_ptr(), *strides)
    if last != 1 or any(number % 2 for number in numbers):
        return v_cache, 2
    return v_cache.view(torch.int16), 4


def _constants(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_pairs: Tensor, v_pairs: Tensor) -> dict[str, int]:
    """Groups of features, the columns of each, and the blocks that hold those."""
    k_groups, v_groups = k_pairs.shape[3], v_pairs.shape[3]
    k_bytes, v_columns = k_cache.shape[3] // k_groups, v_cache.shape[3] // v_groups
    return {
        "K_GROUPS": k_groups,
        "V_GROUPS": v_groups,
        "K_BYTES": k_bytes,
        "COLS_V": v_columns,
        "BLOCK_K": block_of(k_bytes),
        "BLOCK_V": block_of(v_columns),
    }


def _added(q: Tensor) -> dict[str, int]:
    return {"ADDED": _ADDED.get(q.dtype, 0) if device.arch(q).startswith("sm_") else 0}
