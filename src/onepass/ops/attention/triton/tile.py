"""What the kernels of attention share: loads of tiles, the keys that rows see, scores, dropout.

Maxima and lse are in units of log2, as exp2 is what the hardware has: exp(s - lse) is exp2(s * log2(e) - lse), one
multiply-add before it. Where nothing is added to the scaled products, log2(e) is part of the scale. Only the
forward with a bias has maxima in natural units.
"""

import triton
import triton.language as tl

from onepass.core.triton_functions import tanh, widened

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
MOST_LSE: tl.constexpr = tl.constexpr(2.0**24)  # beyond it fp32 has no digits for the weights of a row
# Of the score that lazy steps go by: further down others may be too far above; further up its product with log2(e) is
# rounded by too much. And of the sum of their weights, of which that score's is 1.
LEAST_GUIDE: tl.constexpr = tl.constexpr(-64.0)
MOST_GUIDE: tl.constexpr = tl.constexpr(2.0**16)
LEAST_WEIGHT: tl.constexpr = tl.constexpr(0.5)
MOST_WEIGHT: tl.constexpr = tl.constexpr(2.0**80)
# Of ALIBI: no query sees a key ahead of it, so that |i + shift - j| is a number of the row less one of the column.
ALIBI_BEHIND: tl.constexpr = tl.constexpr(2)
BIAS_BY_TMA: tl.constexpr = tl.constexpr(2)  # of BIAS: there is a descriptor


@triton.jit
def load_tile(ptr, along, across, CHECK_ALONG: tl.constexpr, CHECK_ACROSS: tl.constexpr):
    """A tile of q, k, v or do; 0 outside. `along`: which tokens exist, `across`: which features; (n, 1) or (1, n)."""
    if CHECK_ALONG and CHECK_ACROSS:
        return tl.load(ptr, mask=along & across, other=0.0)
    elif CHECK_ALONG:
        return tl.load(ptr, mask=along, other=0.0)
    elif CHECK_ACROSS:
        return tl.load(ptr, mask=across, other=0.0)
    else:
        return tl.load(ptr)


@triton.jit
def walked_tile(
    base, desc, first, stride_s, stride_d, row, col, length,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile (TOKENS, BLOCK_D) of tokens from `first` on; 0 past the `length` of an EDGE tile and past SIZE features.

    base: where token 0 of the head is. row, col: the same in the descriptor's matrix. The addresses are made here, from
    numbers, so that they take no registers while another walk runs.
    """
    if TMA and not EDGE:
        return desc.load([row + first, col])
    else:
        token = tl.arange(0, TOKENS)[:, None]
        feature = tl.arange(0, BLOCK_D)[None, :]
        offsets = token.to(tl.int64) * stride_s + feature.to(tl.int64) * stride_d
        ptrs = base + tl.cast(first, tl.int64) * stride_s + offsets
        return load_tile(ptrs, first + token < length, feature < SIZE, EDGE, SIZE != BLOCK_D)


@triton.jit
def walked_row(ptr, desc, first, desc_row, length, other, TOKENS: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr):
    """One number of each of TOKENS tokens from `first` on; `other` past the `length` of an EDGE tile."""
    if TMA and not EDGE:
        return tl.reshape(desc.load([desc_row, first]), (TOKENS,))
    else:
        lane = tl.arange(0, TOKENS)
        ptrs = ptr + first + lane
        return tl.load(ptrs, mask=first + lane < length, other=other) if EDGE else tl.load(ptrs)


@triton.jit
def bias_tile(
    base, desc, first_row, first_col, desc_row, desc_col, stride_q, stride_k, seqlen_q, seqlen_k,
    ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr, CHECK_COLS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The bias (ROWS, COLS) of some queries and keys of a head, which begins at `base`, or in the descriptor's matrix.

    Queries past the last have the last one's bias, or one of another head. CHECK_COLS: some keys may not exist, and
    have 0 or a neighbour's. EDGE: no descriptor.
    """
    if BIAS == BIAS_BY_TMA and not EDGE:
        return desc.load([desc_row + first_row, desc_col + first_col])
    else:
        row = tl.minimum(first_row + tl.arange(0, ROWS), seqlen_q - 1)[:, None]
        col = first_col + tl.arange(0, COLS)[None, :]
        ptrs = base + row.to(tl.int64) * stride_q + col.to(tl.int64) * stride_k
        return tl.load(ptrs, mask=col < seqlen_k, other=0.0) if CHECK_COLS else tl.load(ptrs)


@triton.constexpr_function
def lies_in_one(paged, page_size, block):
    """Whether a block's keys lie one after the other: it begins at a multiple of its size. page_size: 0 if unknown."""
    return not paged or (page_size > 0 and page_size % block == 0)


@triton.jit
def page_entries(page_table_ptrs, key, end, page_size):
    """The table's entries for keys before `end`; others are not looked at, and 0."""
    return tl.load(page_table_ptrs + key // page_size, mask=key < end, other=0)


@triton.jit
def placed(entry, key, page_size, pages):
    """The page that each key's entry names and the key's place there; which pages exist."""
    return entry.to(tl.int64), (key % page_size).to(tl.int64), (entry >= 0) & (entry < pages)


@triton.jit
def paged_tile(
    base, page, place, read, stride_p, stride_s, stride_d, SIZE: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tile (TOKENS, BLOCK_D) of keys at places in pages, those to `read`; 0 elsewhere and past SIZE features."""
    feature = tl.arange(0, BLOCK_D)[None, :]
    ptrs = base + (page * stride_p + place * stride_s)[:, None] + feature.to(tl.int64) * stride_d
    return load_tile(ptrs, read[:, None], feature < SIZE, True, SIZE != BLOCK_D)


@triton.jit
def sequence_of(
    batch, cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k, longest_q, longest_k, aligned,
    USED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """The first query of a packed sequence, its queries, its first key, its keys, its shift.

    Whatever the lengths in memory say, what is read lies inside the tensors. total_k: with PAGED what a row of the page
    table can hold. aligned: 1 to the bottom right, else 0.
    """
    first_q = tl.minimum(tl.maximum(tl.load(cu_q_ptr + batch), 0), total_q)
    end_q = tl.maximum(tl.minimum(tl.load(cu_q_ptr + batch + 1), total_q), first_q)
    seqlen_q = tl.minimum(end_q - first_q, longest_q)
    if PAGED:
        first_k = first_q * 0
        if USED:
            seqlen_k = tl.load(used_k_ptr + batch)
        else:
            seqlen_k = tl.load(cu_k_ptr + batch + 1) - tl.load(cu_k_ptr + batch)
        seqlen_k = tl.minimum(seqlen_k, total_k)
    else:
        first_k = tl.minimum(tl.maximum(tl.load(cu_k_ptr + batch), 0), total_k)
        seqlen_k = tl.maximum(tl.minimum(tl.load(cu_k_ptr + batch + 1), total_k), first_k) - first_k
        if USED:
            seqlen_k = tl.minimum(seqlen_k, tl.load(used_k_ptr + batch))
    seqlen_k = tl.maximum(tl.minimum(seqlen_k, longest_k), 0)
    shift = aligned * (seqlen_k - seqlen_q)
    return first_q.to(tl.int64), seqlen_q, first_k.to(tl.int64), seqlen_k, shift


@triton.jit
def seen_range(
    first, last, shift_left, shift_right, length, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The others (keys of queries, or queries of keys) that tokens first..last see, in blocks.

    A token t sees others from t - shift_left to t + shift_right, among 0..length - 1. Returns start <= a <= b and end:
    in the whole blocks of [a, b) every token sees everything, in [start, a) and [b, end) some do not; outside of
    [start, end) nobody sees anything. `end` is no multiple of BLOCK, and below start where nobody sees anything at all;
    without LEFT start == a == 0.
    """
    start, end, inner_start, inner_end = 0, length, 0, length
    if LEFT:
        start = tl.maximum(first - shift_left, 0) // BLOCK * BLOCK
        inner_start = tl.cdiv(tl.maximum(last - shift_left, 0), BLOCK) * BLOCK
    if RIGHT:
        end = tl.minimum(last + shift_right + 1, length)
        inner_end = tl.maximum(tl.minimum(first + shift_right + 1, length), 0)
    inner_end = inner_end // BLOCK * BLOCK
    none = inner_end <= inner_start
    return start, tl.where(none, start, inner_start), tl.where(none, start, inner_end), end


@triton.jit
def whole_blocks(end, least, length, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Where the last block that begins before `end` and that `length` does not cut ends; `least` if none does."""
    whole = tl.cdiv(end, BLOCK) * BLOCK
    if not EVEN:
        whole = tl.maximum(tl.minimum(whole, length // BLOCK * BLOCK), least)
    return whole


@triton.jit
def split_range(
    first, last, shift_left, shift_right, length, split, splits, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """seen_range of one of `splits` parts: whole blocks, shared out evenly."""
    start, inner_start, inner_end, end = seen_range(first, last, shift_left, shift_right, length, LEFT, RIGHT, BLOCK)
    end = tl.maximum(end, start)  # before it where nobody sees anything
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK), splits) * BLOCK
    start += split * share
    end = tl.minimum(end, start + share)
    inner_start = tl.minimum(tl.maximum(inner_start, start), end)
    inner_end = tl.maximum(tl.minimum(inner_end, start + share), inner_start)
    return start, inner_start, inner_end, end


@triton.jit
def decode_place(nheads_kv, rows, BLOCK_M: tl.constexpr):
    """(KV head, batch, first of its rows) of a program of decode: heads side by side, as they lie in memory.

    rows: queries times heads of a group.
    """
    sheet = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    kv_head, rest = sheet % nheads_kv, sheet // nheads_kv
    return kv_head.to(tl.int64), (rest // tiles).to(tl.int64), rest % tiles * BLOCK_M


@triton.jit
def part_of(part: tl.constexpr, start, inner_start, inner_end, whole_end, end):
    """Where a walk's parts begin and end: 0 before the inner blocks, 1 those, 2 after them, 3 the block that is cut."""
    first = start if part == 0 else inner_start if part == 1 else inner_end if part == 2 else whole_end
    last = inner_start if part == 0 else inner_end if part == 1 else whole_end if part == 2 else end
    return first, last


@triton.jit
def visible(row, col, shift, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which keys which queries see by window and causal mask; only with LEFT or RIGHT."""
    ahead = col - row - shift
    if LEFT and RIGHT:
        return (ahead >= -window_left) & (ahead <= window_right)
    elif LEFT:
        return ahead >= -window_left
    else:
        return ahead <= window_right


@triton.jit
def adjusted_scores(
    s, row, col, near, shift, scale, softcap, slope, bias,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(scores, the slope of softcap or 1.0) of products s = q k^T: scale, softcap, ALiBi, bias.

    scale: softmax_scale, or with SOFTCAP softmax_scale / softcap. slope: of ALiBi. near: a number near row + shift
    and col: distances from it are taken in fp32, converted once a row and a column. ALIBI_BEHIND leaves the row's part
    to the caller.
    """
    cap_slope = 1.0
    if SOFTCAP:
        t = tanh(s * scale)
        cap_slope = 1.0 - t * t
        s = t * softcap
    else:
        s = s * scale
    if ALIBI == ALIBI_BEHIND:
        s += slope * (col - near).to(tl.float32)
    elif ALIBI:
        s -= slope * tl.abs((row + shift - near).to(tl.float32) - (col - near).to(tl.float32))
    if BIAS == BIAS_BY_TMA:
        s += widened(bias)
    elif BIAS:
        s += bias.to(tl.float32)
    return s, cap_slope


@triton.jit
def power_of(x):
    """The power of two below (or at) each x >= 0 of fp32, 1 for 0: x without it is below 2, and as exact as before."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power == 0.0, 1.0, power)


@triton.jit
def nothing_seen(ROWS: tl.constexpr, COLS: tl.constexpr):
    """The output, maximum and sum before the first key."""
    return (
        tl.zeros((ROWS, COLS), tl.float32),
        tl.full((ROWS,), -float("inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )


@triton.jit
def softmax_step(s, unit, largest, total, AXIS: tl.constexpr, EXACT: tl.constexpr):
    """(weights of a block's scores, what earlier sums are multiplied by, the new maximum and sum).

    unit: to log2, a number or one for each row. AXIS: of the keys. EXACT: scores may be as large as a bias makes them,
    of which products with `unit` overflow or round by more than a power of two; then maxima are not in log2 either.
    """
    before = largest
    if EXACT:
        largest = tl.maximum(largest, tl.max(s, AXIS))
        top = tl.where(largest == -float("inf"), 0.0, largest)
        p = tl.exp2((s - tl.expand_dims(top, AXIS)) * unit)
        correction = tl.exp2((before - top) * unit)
    else:
        largest = tl.maximum(largest, tl.max(s, AXIS) * unit)
        top = tl.where(largest == -float("inf"), 0.0, largest)
        p = tl.exp2(s * unit - tl.expand_dims(top, AXIS))
        correction = tl.exp2(before - top)
    return p, correction, largest, total * correction + tl.sum(p, AXIS)


@triton.jit
def is_a_guide(largest):
    """Whether lazy steps may go by these scores: others will hardly be so far above that weights overflow."""
    return tl.max(tl.where((largest > LEAST_GUIDE) & (largest < MOST_GUIDE), 0, 1), 0) == 0


@triton.jit
def lost_a_row(acc, total):
    """Whether weights of lazy steps may have overflowed."""
    lost = tl.where(tl.abs(acc) < float("inf"), 0, 1)
    return tl.max(tl.max(lost, 1) | tl.where((total > LEAST_WEIGHT) & (total < MOST_WEIGHT), 0, 1), 0) > 0


@triton.jit
def with_sink(acc, largest, total, sink, EXACT: tl.constexpr):
    """The running output, maximum and sum of rows with one logit more, which adds no value."""
    sink = sink.to(tl.float32)
    unit: tl.constexpr = LOG2_E if EXACT else 1.0
    if not EXACT:
        sink *= LOG2_E
    before = largest
    largest = tl.maximum(largest, sink)
    top = tl.where(largest == -float("inf"), 0.0, largest)
    correction = tl.exp2((before - top) * unit)
    return acc * correction[:, None], largest, total * correction + tl.exp2((sink - top) * unit)


@triton.jit
def kept(rng_ptr, threshold, sheet, row, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights dropout keeps, (ROWS, COLS) or its transpose; docs/conventions.md has the definition.

    sheet: batch * nheads_q + head. threshold: ceil(p * 2**32), an int64 of at least 1. first_col is a multiple of 4.
    """
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    quad = first_col // 4 + tl.arange(0, COLS // 4)
    zero = tl.zeros((ROWS, COLS // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + offset.to(tl.uint32),
        zero + sheet.to(tl.uint32),
        zero + row.to(tl.uint32)[:, None],
        zero + quad.to(tl.uint32)[None, :],
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (ROWS, COLS / 4, 2, 2): word 2 x + y is at [x, y]
    keep = tl.reshape(words, (ROWS, COLS)) > tl.cast(threshold - 1, tl.uint32)  # p = 1 keeps none
    if TRANSPOSED:
        keep = tl.trans(keep)
    return keep


@triton.jit
def weights(
    s, row, col, near, seen, lse2, shift, window_left, window_right, scale, softcap, slope, bias,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """(p, the slope of softcap) of products s = q k^T; row, col, lse2 and seen broadcast to its shape."""
    cap_slope = 1.0
    if ALIBI == ALIBI_BEHIND:  # before the products are waited for
        lse2 += slope * LOG2_E * (row + shift - near).to(tl.float32)
    if SOFTCAP or ALIBI or BIAS:
        s, cap_slope = adjusted_scores(s, row, col, near, shift, scale, softcap, slope, bias, SOFTCAP, ALIBI, BIAS)
        p = tl.exp2(s * LOG2_E - lse2)
    else:
        p = tl.exp2(s * scale - lse2)
    if EDGE and (LEFT or RIGHT):
        p = tl.where(visible(row, col, shift, window_left, window_right, LEFT, RIGHT), p, 0.0)
    if KEY_MASK:
        p = tl.where(seen, p, 0.0)
    return p, cap_slope
