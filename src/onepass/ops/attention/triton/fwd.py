"""attention on GPUs, forward (FlashAttention-2, Dao 2023).

A program takes BLOCK_M queries of one head and walks the keys that they see, BLOCK_N at a time, with a running maximum,
sum and output (online softmax, Milakov and Gimelshein 2018). Blocks that nobody sees are skipped, blocks that everybody
sees have no code for masks. Those of long bf16 calls (LAZY) have none for maxima either: their weights go by the score
of one key, and a tile whose weights then leave the range of bf16 is computed again with maxima.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher, multiprocessors
from onepass.ops.attention.triton.config import ForwardConfig, Schedule, forward_config
from onepass.ops.attention.triton.problem import BY_POINTERS, Problem, walked, walked_bias
from onepass.ops.attention.triton.tile import (
    BIAS_BY_TMA,
    LN_2,
    LOG2_E,
    adjusted_scores,
    bias_tile,
    is_a_guide,
    kept,
    load_tile,
    lost_a_row,
    nothing_seen,
    page_entries,
    paged_tile,
    part_of,
    placed,
    seen_range,
    sequence_of,
    softmax_step,
    visible,
    walked_tile,
    whole_blocks,
    with_sink,
)


@triton.jit
def _attend(
    q, acc, largest, total, k_base, v_base, k_desc, v_desc, k_row, k_col, v_row, v_col,
    bias_base, bias_desc, bias_row, bias_col,
    key_mask_ptrs, rng_ptr, page_table_ptrs, page_size, pages, stride_kp, stride_vp,
    start, end, first_row, seqlen_q, seqlen_k, stride_ks, stride_kd, stride_vs, stride_vd, stride_bq, stride_bk,
    stride_mk, row, sheet,
    slope, shift, window_left, window_right, scale, softcap, threshold,
    EDGE: tl.constexpr, CUT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr, TMA: tl.constexpr, LAZY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The keys from start to end; in EDGE blocks some are unseen, in CUT blocks some do not exist.

    LAZY: `largest` stays, and weights may be above 1, for which floating point has room. So nothing is multiplied by a
    correction, and sums of the keys that one thread holds are added up at the end.
    """
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or BIAS)
    unit = scale if PLAIN else LOG2_E  # positive: q has the sign that makes the scale so
    lane = tl.arange(0, BLOCK_N)
    top = largest * unit if BIAS else largest
    parts = tl.zeros((BLOCK_M, 8), tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        col = first + lane
        ahead = tl.cast(first, tl.int64)
        if PAGED:
            stored = col < seqlen_k
            entry = page_entries(page_table_ptrs, col, seqlen_k, page_size)
            page, place, exists = placed(entry, col, page_size, pages)
            k = paged_tile(
                k_base, page, place, stored & exists, stride_kp, stride_ks, stride_kd, HEAD_DIM, BLOCK_N, BLOCK_D
            )
        else:
            k = walked_tile(
                k_base, k_desc, first, stride_ks, stride_kd, k_row, k_col, seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, CUT,
                TMA,
            )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if PAGED:  # a page that does not exist is not read, and shows as NaN
            s = tl.where((stored & ~exists)[None, :], float("nan"), s)
        if not PLAIN:
            bias = 0.0
            if BIAS:
                bias = bias_tile(
                    bias_base, bias_desc, first_row, first, bias_row, bias_col, stride_bq, stride_bk, seqlen_q,
                    seqlen_k, BLOCK_M, BLOCK_N, CUT, CUT, BIAS,
                )  # fmt: skip
            s, _ = adjusted_scores(
                s, row[:, None], col[None, :], first, shift, scale, softcap, slope, bias, SOFTCAP, ALIBI, BIAS
            )
        if CUT:
            s = tl.where((col < seqlen_k)[None, :], s, -float("inf"))
        if EDGE and (LEFT or RIGHT):
            seen = visible(row[:, None], col[None, :], shift, window_left, window_right, LEFT, RIGHT)
            s = tl.where(seen, s, -float("inf"))
        if KEY_MASK:
            key_seen = tl.load(key_mask_ptrs + ahead * stride_mk, mask=col < seqlen_k, other=0) != 0
            s = tl.where(key_seen[None, :], s, -float("inf"))
        if LAZY:
            p = tl.exp2(s * unit - top[:, None])
            parts += tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N // 8, 8)), 1)
        else:
            p, correction, largest, total = softmax_step(s, unit, largest, total, 1, BIAS != 0)
            acc = acc * correction[:, None]
        if DROPOUT:
            p = tl.where(kept(rng_ptr, threshold, sheet, row, first, BLOCK_M, BLOCK_N, False), p, 0.0)
        if PAGED:
            v = paged_tile(
                v_base, page, place, stored & exists, stride_vp, stride_vs, stride_vd, HEAD_DIM_V, BLOCK_N, BLOCK_DV
            )
        else:
            v = walked_tile(
                v_base, v_desc, first, stride_vs, stride_vd, v_row, v_col, seqlen_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV,
                CUT, TMA,
            )  # fmt: skip
        if KEY_MASK:  # what is masked may hold anything
            v = tl.where(key_seen[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if LAZY:
        total += tl.sum(parts, 1)
    return acc, largest, total


@triton.jit
def _tile(
    tile,
    q_ptr, k_ptr, v_ptr, k_desc, k_per_batch, k_per_head, k_col_head, v_desc, v_per_batch, v_per_head, v_col_head,
    bias_desc, bias_per_batch, bias_per_head, bias_col_head, out_ptr, lse_ptr, sink_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    seqlen_q, seqlen_k, nheads_q, sign,
    page_table_ptr, max_pages, page_size, pages, stride_kp, stride_vp,
    bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
    shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, USED: tl.constexpr, PAGED: tl.constexpr, TMA: tl.constexpr,
    SINK: tl.constexpr, SIGNED: tl.constexpr, LAZY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M queries of one head."""
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = tile % blocks
    if RIGHT:
        block = blocks - 1 - block  # the rows that see most keys first
    sheet = tile // blocks
    batch = (sheet // nheads_q).to(tl.int64)
    head = sheet % nheads_q
    kv_head = head // GROUP
    if VARLEN:
        first_q, seqlen_q, first_k, seqlen_k, shift = sequence_of(
            batch, cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k, seqlen_q, seqlen_k, shift, USED, PAGED
        )
        seqlen_k = tl.where(block * BLOCK_M < seqlen_q, seqlen_k, 0)  # past the last query nothing is walked
        q_ptr += first_q * stride_qs
        k_ptr += first_k * stride_ks
        v_ptr += first_k * stride_vs
        if KEY_MASK:
            key_mask_ptr += first_k * stride_mk
    page_table_ptrs = page_table_ptr
    if PAGED:
        page_table_ptrs = page_table_ptr + batch * max_pages
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < seqlen_q
    # Rows past the end read the last row again: what they compute is not stored.
    row_read = tl.minimum(row, seqlen_q - 1).to(tl.int64)
    feature = tl.arange(0, BLOCK_D)
    feature_v = tl.arange(0, BLOCK_DV)
    lane = tl.arange(0, BLOCK_N)
    q_ptrs = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    q = load_tile(
        q_ptrs + row_read[:, None] * stride_qs + feature[None, :].to(tl.int64) * stride_qd,
        there[:, None],
        feature[None, :] < HEAD_DIM,
        VARLEN,
        HEAD_DIM != BLOCK_D,
    )
    if SIGNED:
        q = (q * sign).to(q.dtype)
    k_base = k_ptr + batch * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head.to(tl.int64) * stride_vh
    k_row = (batch * k_per_batch + kv_head * k_per_head).to(tl.int32)
    v_row = (batch * v_per_batch + kv_head * v_per_head).to(tl.int32)
    k_col, v_col = kv_head * k_col_head, kv_head * v_col_head
    if VARLEN:
        k_row += first_k.to(tl.int32)
        v_row += first_k.to(tl.int32)
    bias_base = bias_ptr
    if BIAS:
        bias_base = bias_ptr + batch * stride_bb + head.to(tl.int64) * stride_bh
    bias_row, bias_col = (batch * bias_per_batch + head * bias_per_head).to(tl.int32), head * bias_col_head
    key_mask_ptrs = key_mask_ptr
    if KEY_MASK:
        key_mask_ptrs = key_mask_ptr + batch * stride_mb + lane.to(tl.int64) * stride_mk
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)
    first_row = block * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, seqlen_q) - 1
    start, inner_start, inner_end, end = seen_range(
        first_row, last_row, window_left - shift, window_right + shift, seqlen_k, LEFT, RIGHT, BLOCK_N
    )
    # Blocks before the inner ones (only a window has such), those, blocks after them, and the one that the end cuts.
    whole_end = whole_blocks(end, inner_end, seqlen_k, EVEN, BLOCK_N)
    acc, largest, total = nothing_seen(BLOCK_M, BLOCK_DV)
    lazy_end = inner_end
    if LAZY:  # every query sees the inner keys: by the score of one of them go the weights of all
        guide = (inner_end - 1 if RIGHT else inner_start).to(tl.int64)
        some = inner_start < inner_end
        k_ptrs = k_base + guide * stride_ks + feature.to(tl.int64) * stride_kd
        k = tl.load(k_ptrs, mask=some & (feature < HEAD_DIM), other=0.0)
        largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
        if BIAS:
            column = bias_base + guide * stride_bk
            largest += tl.load(column + row_read * stride_bq, mask=some, other=0.0).to(tl.float32)
        guided = some & is_a_guide(largest)
        lazy_end = tl.where(guided, inner_end, inner_start)
        largest = tl.where(guided, largest, -float("inf"))
    for part in tl.static_range(0 if LEFT else 1, 3 if EVEN else 4):
        if part != 2 or LEFT or RIGHT:
            first, last = part_of(part, start, inner_start, lazy_end, whole_end, end)
            acc, largest, total = _attend(
                q, acc, largest, total, k_base, v_base, k_desc, v_desc, k_row, k_col, v_row, v_col, bias_base,
                bias_desc, bias_row, bias_col, key_mask_ptrs, rng_ptr, page_table_ptrs, page_size, pages, stride_kp,
                stride_vp,
                first, last, first_row, seqlen_q, seqlen_k, stride_ks, stride_kd, stride_vs, stride_vd, stride_bq,
                stride_bk, stride_mk, row, sheet, slope, shift, window_left, window_right, scale, softcap,
                threshold,
                part != 1, part == 3, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS,
                KEY_MASK, DROPOUT, PRECISION, PAGED, TMA, LAZY and part == 1, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    if LAZY:
        again = guided & lost_a_row(acc, total)
        if not LEFT and not RIGHT:  # else the part after the inner blocks had them too
            again |= lazy_end < inner_end
        if again:  # by maxima
            acc, largest, total = nothing_seen(BLOCK_M, BLOCK_DV)
            acc, largest, total = _attend(
                q, acc, largest, total, k_base, v_base, k_desc, v_desc, k_row, k_col, v_row, v_col, bias_base,
                bias_desc, bias_row, bias_col, key_mask_ptrs, rng_ptr, page_table_ptrs, page_size, pages, stride_kp,
                stride_vp,
                start, end, first_row, seqlen_q, seqlen_k, stride_ks, stride_kd, stride_vs, stride_vd, stride_bq,
                stride_bk, stride_mk, row, sheet, slope, shift, window_left, window_right, scale, softcap,
                threshold,
                True, not EVEN, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS,
                KEY_MASK, DROPOUT, PRECISION, PAGED, TMA, False, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    if SINK:
        acc, largest, total = with_sink(acc, largest, total, tl.load(sink_ptr + head), BIAS)
    top = tl.where(largest == -float("inf"), 0.0, largest)
    empty = total == 0.0
    weight = 1.0 / tl.where(empty, 1.0, total)
    if DROPOUT:
        weight *= kept_scale
    lse = tl.where(empty, -float("inf"), (top if BIAS else top * LN_2) + tl.log(total))
    if VARLEN:
        lse_ptr += head.to(tl.int64) * total_q + first_q
    else:
        lse_ptr += sheet.to(tl.int64) * seqlen_q
    tl.store(lse_ptr + row, lse, mask=there)
    if VARLEN:
        token = first_q
    else:
        token = batch * seqlen_q
    out_ptrs = out_ptr + ((token + row[:, None]) * nheads_q + head) * HEAD_DIM_V + feature_v[None, :]
    out = (acc * weight[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=there[:, None] & (feature_v[None, :] < HEAD_DIM_V))


@triton.jit
def _past_the_end(tile, cu_q_ptr, longest_q, nheads_q, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether a tile of packed sequences has no queries, because its sequence is shorter than the longest."""
    blocks = tl.cdiv(longest_q, BLOCK_M)
    block = tile % blocks
    if RIGHT:
        block = blocks - 1 - block
    batch = tile // blocks // nheads_q
    return block * BLOCK_M >= tl.load(cu_q_ptr + batch + 1) - tl.load(cu_q_ptr + batch)


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, k_per_batch, k_per_head, k_col_head, v_desc, v_per_batch, v_per_head, v_col_head,
    bias_desc, bias_per_batch, bias_per_head, bias_col_head, out_ptr, lse_ptr, sink_ptr, counter_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    seqlen_q, seqlen_k, nheads_q, sign, tiles,
    page_table_ptr, max_pages, page_size, pages, stride_kp, stride_vp,
    bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
    shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, USED: tl.constexpr, PAGED: tl.constexpr, TMA: tl.constexpr,
    SINK: tl.constexpr, SIGNED: tl.constexpr, LAZY: tl.constexpr, SCHEDULE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes one tile; or every so-many-th; or, SCHEDULE "dynamic", the next one that nobody has taken."""
    tile = tl.program_id(0)
    if SCHEDULE == "dynamic":
        tile = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    if SCHEDULE == "one":
        if VARLEN:
            if _past_the_end(tile, cu_q_ptr, seqlen_q, nheads_q, RIGHT, BLOCK_M):
                return
        _tile(
            tile, q_ptr, k_ptr, v_ptr, k_desc, k_per_batch, k_per_head, k_col_head,
            v_desc, v_per_batch, v_per_head, v_col_head,
            bias_desc, bias_per_batch, bias_per_head, bias_col_head, out_ptr, lse_ptr, sink_ptr,
            stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
            stride_vb, stride_vs, stride_vh, stride_vd, seqlen_q, seqlen_k, nheads_q, sign,
            page_table_ptr, max_pages, page_size, pages, stride_kp, stride_vp,
            bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
            stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
            shift, window_left, window_right, scale, softcap, threshold, kept_scale,
            cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
            GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS, KEY_MASK, DROPOUT,
            PRECISION, VARLEN, USED, PAGED, TMA, SINK, SIGNED, LAZY, BLOCK_M, BLOCK_N, EVEN, STAGES,
        )  # fmt: skip
    else:
        while tile < tiles:
            _tile(
                tile, q_ptr, k_ptr, v_ptr, k_desc, k_per_batch, k_per_head, k_col_head,
                v_desc, v_per_batch, v_per_head, v_col_head,
                bias_desc, bias_per_batch, bias_per_head, bias_col_head, out_ptr, lse_ptr, sink_ptr,
                stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vh, stride_vd, seqlen_q, seqlen_k, nheads_q, sign,
                page_table_ptr, max_pages, page_size, pages, stride_kp, stride_vp,
                bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
                stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
                shift, window_left, window_right, scale, softcap, threshold, kept_scale,
                cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
                GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS, KEY_MASK, DROPOUT,
                PRECISION, VARLEN, USED, PAGED, TMA, SINK, SIGNED, LAZY, BLOCK_M, BLOCK_N, EVEN, STAGES,
            )  # fmt: skip
            if SCHEDULE == "dynamic":
                tile = tl.atomic_add(counter_ptr, 1, sem="relaxed")
            else:
                tile += tl.num_programs(0)


_fwd = Launcher(_fwd_kernel)


def forward(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None,
    key_mask: Tensor | None, rng_state: Tensor | None, softmax_scale: float, window_left: int, window_right: int,
    bottom_right: bool, softcap: float, dropout_p: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (batch, seqlen_q, nheads_q, head_dim_v) and lse (batch, nheads_q, seqlen_q)."""
    problem = Problem(
        q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, softmax_scale, window_left, window_right,
        bottom_right, softcap, dropout_p,
    )  # fmt: skip
    return run(problem, forward_config(problem))


def run(problem: Problem, config: ForwardConfig) -> tuple[Tensor, Tensor]:
    """The forward with a configuration."""
    q, k, v, sink = problem.q, problem.k, problem.v, problem.attn_sink
    batch, seqlen_q, nheads_q = problem.batch, problem.seqlen_q, q.shape[2]
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], nheads_q, q.shape[1]), dtype=torch.float32, device=q.device)
    tiles = batch * nheads_q * triton.cdiv(seqlen_q, config.block_m)
    if not tiles:
        return out, lse
    programs, counter = tiles, None
    if config.schedule is not Schedule.ONE:
        programs = min(tiles, config.programs_per_processor * multiprocessors(q.device))
    if config.schedule is Schedule.DYNAMIC:
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    scale, sign = problem.positive_scale()
    walked_k, walked_v = walked(k, config.block_n), walked(v, config.block_n)
    tma = config.tma and not problem.paged and walked_k.descriptor is not None and walked_v.descriptor is not None
    if not tma:
        walked_k = walked_v = BY_POINTERS
    bias = walked_bias(problem, config.block_m, config.block_n) if config.tma else BY_POINTERS
    _fwd.launch(
        (programs, 1, 1),
        q.device,
        (
            q, k, v, *walked_k.arguments, *walked_v.arguments, *bias.arguments, out, lse,
            None if sink is None else sink.contiguous(), counter,
            *problem.strides(q), *problem.strides(k), *problem.strides(v),
            seqlen_q, problem.seqlen_k, nheads_q, sign, tiles, *_pages(problem), *problem.options(scale),
        ),
        problem.constants()
        | ({"BIAS": BIAS_BY_TMA.value} if bias.descriptor is not None else {})
        | {
            "PAGED": problem.paged,
            "TMA": tma,
            "SINK": sink is not None,
            "SIGNED": sign != 1.0,
            "LAZY": problem.lazy,
            "SCHEDULE": config.schedule.value,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "EVEN": problem.even_keys(config.block_n),
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
    )  # fmt: skip
    return out, lse


def _pages(problem: Problem) -> tuple[Any, ...]:
    """The page table, its width, the sizes of pages, and the strides from page to page of k and v."""
    if problem.packed is None or problem.packed.page_table is None:
        return (None,) * 6
    k, table = problem.k, problem.packed.page_table
    return table.contiguous(), table.shape[1], k.shape[1], k.shape[0], k.stride(0), problem.v.stride(0)
