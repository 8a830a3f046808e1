"""attention on GPUs, backward (FlashAttention-2, Dao 2023), without atomics: the same bits every time.

    delta = rowsum(do * out) - dlse
    p  = exp(scores - lse),  dv = p^T do
    ds = p * (do v^T - delta),  dq = ds k * softmax_scale,  dk = ds^T q * softmax_scale

One kernel makes delta (bwd_rows.py), one holds keys and walks queries for dk and dv, one holds queries and walks keys
for dq, and for a bias that is not broadcast writes dbias = ds. Else one (bwd_bias.py) holds a tile of the bias and
walks what was broadcast along it. Each computes the scores again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.attention.triton import bwd_bias, bwd_rows
from onepass.ops.attention.triton.config import (
    BackwardConfig,
    backward_bias_config,
    backward_keys_config,
    backward_queries_config,
)
from onepass.ops.attention.triton.problem import (
    BY_POINTERS,
    Held,
    Problem,
    Walked,
    tensors_of,
    walked,
    walked_bias,
    walked_rows,
)
from onepass.ops.attention.triton.tile import (
    BIAS_BY_TMA,
    bias_tile,
    kept,
    load_tile,
    part_of,
    seen_range,
    sequence_of,
    visible,
    walked_row,
    walked_tile,
    weights,
    whole_blocks,
)


@triton.jit
def _walk_queries(
    dk, dv, k, v, q_ptr, do_ptr, q_desc, do_desc, q_row, q_per_head, q_col_head, do_row, do_per_head, do_col_head,
    row_desc, lse2_row, delta_row, bias_desc, bias_row, bias_per_head, bias_col_head,
    lse2_ptr, delta_ptr, bias_ptr, slopes_ptr, rng_ptr,
    start, count, inner_start, inner_end, seqlen_q, seqlen_k, row_head, first_head, first_sheet,
    stride_qs, stride_qh, stride_qd, stride_ds, stride_dh, stride_dd, stride_bh, stride_bq, stride_bk, stride_ah,
    col, seen, first_col, shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    CUT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`count` blocks of queries of each head of the group, one head after the other, in one loop.

    Tiles are transposed, (BLOCK_N, BLOCK_M). CUT: the sequence ends inside the block. Pointers are to the batch,
    first_head and first_sheet to the group; row_head is from one head to the next in lse2 and delta.
    """
    lane = tl.arange(0, BLOCK_M)
    member, first_of_member = 0, 0  # no division by `count`, which the compiler would take for a promise that it is > 0
    for step in tl.range(0, GROUP * count, num_stages=STAGES):
        if GROUP > 1:
            begins = step - first_of_member == count
            member += begins.to(tl.int32)
            first_of_member = tl.where(begins, step, first_of_member)
        first = start + (step - first_of_member) * BLOCK_M
        head = first_head + member
        row = first + lane
        q = walked_tile(
            q_ptr + head * stride_qh, q_desc, first, stride_qs, stride_qd,
            q_row + member * q_per_head, (head * q_col_head).to(tl.int32),
            seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, CUT, TMA,
        )  # fmt: skip
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        do = walked_tile(
            do_ptr + head * stride_dh, do_desc, first, stride_ds, stride_dd,
            do_row + member * do_per_head, (head * do_col_head).to(tl.int32),
            seqlen_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, CUT, TMA,
        )  # fmt: skip
        delta = walked_row(
            delta_ptr + member * row_head, row_desc, first, delta_row + member, seqlen_q, 0.0, BLOCK_M, CUT, TMA_ROWS
        )  # fmt: skip
        # Before p: then dv's product runs while ds is computed.
        if DROPOUT:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        else:
            less_delta = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - delta[None, :]
            dp = tl.dot(v, tl.trans(do), less_delta, input_precision=PRECISION)
        bias = 0.0
        if BIAS:
            bias = bias_tile(
                bias_ptr + head * stride_bh, bias_desc, first, first_col, bias_row + member * bias_per_head,
                (head * bias_col_head).to(tl.int32), stride_bq, stride_bk, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CUT,
                True, BIAS,
            )  # fmt: skip
            bias = tl.trans(bias)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + head * stride_ah)
        lse2 = walked_row(
            lse2_ptr + member * row_head, row_desc, first, lse2_row + member, seqlen_q, float("inf"), BLOCK_M, CUT,
            TMA_ROWS,
        )  # fmt: skip
        p, cap_slope = weights(
            s, row[None, :], col[:, None], first_col, seen, lse2[None, :], shift, window_left, window_right, scale,
            softcap, slope, bias, False, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS, KEY_MASK,
        )  # fmt: skip
        if CUT and BIAS:  # of queries past the end, exp2(bias - inf): NaN where the bias is NaN or inf
            p = tl.where((row < seqlen_q)[None, :], p, 0.0)
        if LEFT or RIGHT:
            if (first < inner_start) | (first >= inner_end):
                p = tl.where(visible(row[None, :], col[:, None], shift, window_left, window_right, LEFT, RIGHT), p, 0.0)
        weight = p
        if DROPOUT:
            keep = kept(rng_ptr, threshold, first_sheet + member, row, first_col, BLOCK_M, BLOCK_N, True)
            weight = tl.where(keep, p * kept_scale, 0.0)
        dv = tl.dot(weight.to(do.dtype), do, dv, input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(keep, dp * kept_scale, 0.0) - delta[None, :]
        ds = p * dp
        if SOFTCAP:
            ds *= cap_slope
        if KEY_MASK:  # what is masked may hold anything
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _keys_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, q_desc, q_per_batch, q_per_head, q_col_head,
    do_desc, do_per_batch, do_per_head, do_col_head,
    row_desc, rows, bias_desc, bias_per_batch, bias_per_head, bias_col_head, dk_ptr, dv_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_db, stride_ds, stride_dh, stride_dd, stride_row,
    seqlen_q, seqlen_k, nheads_q, softmax_scale,
    bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
    shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, USED: tl.constexpr, TMA: tl.constexpr, TMA_ROWS: tl.constexpr, EVEN: tl.constexpr,
    SHARED_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one KV head: its query heads one after the other."""
    blocks = tl.cdiv(seqlen_k, BLOCK_N)
    block = tl.program_id(0) % blocks  # with a causal mask the first keys are seen most
    sheet_kv = tl.program_id(0) // blocks
    nheads_kv = nheads_q // GROUP
    batch = (sheet_kv // nheads_kv).to(tl.int64)
    kv_head = (sheet_kv % nheads_kv).to(tl.int64)
    if SHARED_BIAS:  # sequences that read the same part of the bias run at the same time
        batches = tl.num_programs(0) // (blocks * nheads_kv)
        block = tl.program_id(0) // batches % blocks
        batch = (tl.program_id(0) % batches).to(tl.int64)
        kv_head = (tl.program_id(0) // (batches * blocks)).to(tl.int64)
    first_col = block * BLOCK_N
    if VARLEN:
        first_q, seqlen_q, first_k, seqlen_k, shift = sequence_of(
            batch, cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k, seqlen_q, seqlen_k, shift, USED, False
        )
        if first_col >= seqlen_k:
            return
        q_ptr += first_q * stride_qs
        do_ptr += first_q * stride_ds
        k_ptr += first_k * stride_ks
        v_ptr += first_k * stride_vs
        if KEY_MASK:
            key_mask_ptr += first_k * stride_mk
    col = first_col + tl.arange(0, BLOCK_N)
    there = col < seqlen_k
    col_read = tl.minimum(col, seqlen_k - 1).to(tl.int64)  # keys past the end are computed with, and not stored
    feature = tl.arange(0, BLOCK_D)
    feature_v = tl.arange(0, BLOCK_DV)
    k = load_tile(
        k_ptr + batch * stride_kb + kv_head * stride_kh
        + col_read[:, None] * stride_ks + feature[None, :].to(tl.int64) * stride_kd,
        there[:, None], feature[None, :] < HEAD_DIM, False, HEAD_DIM != BLOCK_D,
    )  # fmt: skip
    v = load_tile(
        v_ptr + batch * stride_vb + kv_head * stride_vh
        + col_read[:, None] * stride_vs + feature_v[None, :].to(tl.int64) * stride_vd,
        there[:, None], feature_v[None, :] < HEAD_DIM_V, False, HEAD_DIM_V != BLOCK_DV,
    )  # fmt: skip
    seen = there[:, None]
    if KEY_MASK:
        seen = (tl.load(key_mask_ptr + batch * stride_mb + col_read * stride_mk) != 0)[:, None]
    last_col = tl.minimum(first_col + BLOCK_N, seqlen_k) - 1
    # A key sees queries from j - shift - window_right to j - shift + window_left.
    start, inner_start, inner_end, end = seen_range(
        first_col, last_col, window_right + shift, window_left - shift, seqlen_q, RIGHT, LEFT, BLOCK_M
    )
    first_head = kv_head * GROUP
    first_sheet = batch * nheads_q + first_head
    row_head = tl.cast(stride_row, tl.int64)
    if VARLEN:
        row_at = first_head * stride_row + first_q
    else:
        row_at = first_sheet * stride_row
    lse2_row = first_sheet.to(tl.int32)
    q_row = (batch * q_per_batch + first_head * q_per_head).to(tl.int32)
    do_row = (batch * do_per_batch + first_head * do_per_head).to(tl.int32)
    bias_row = (batch * bias_per_batch + first_head * bias_per_head).to(tl.int32)
    if VARLEN:
        q_row += first_q.to(tl.int32)
        do_row += first_q.to(tl.int32)
    whole_end = whole_blocks(end, start, seqlen_q, EVEN, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # Whole blocks, then the one that the end of the sequence cuts, in parts that take fewer registers.
    TAIL: tl.constexpr = max(BLOCK_M // 2, 16)
    for part in tl.static_range(0, 1 if EVEN else 2):
        first = start if part == 0 else whole_end
        last = whole_end if part == 0 else end
        dk, dv = _walk_queries(
            dk, dv, k, v, q_ptr + batch * stride_qb, do_ptr + batch * stride_db, q_desc, do_desc,
            q_row, q_per_head, q_col_head, do_row, do_per_head, do_col_head,
            row_desc, lse2_row, lse2_row + rows, bias_desc, bias_row, bias_per_head, bias_col_head,
            lse2_ptr + row_at, delta_ptr + row_at, bias_ptr + batch * stride_bb if BIAS else bias_ptr,
            slopes_ptr + batch * stride_ab if ALIBI else slopes_ptr, rng_ptr,
            first, tl.maximum(tl.cdiv(last - first, BLOCK_M if part == 0 else TAIL), 0), inner_start, inner_end,
            seqlen_q, seqlen_k, row_head, first_head, first_sheet,
            stride_qs, stride_qh, stride_qd, stride_ds, stride_dh, stride_dd, stride_bh, stride_bq, stride_bk,
            stride_ah,
            col, seen, first_col, shift, window_left, window_right, scale, softcap, threshold, kept_scale,
            part == 1, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS, KEY_MASK,
            DROPOUT, PRECISION, TMA, TMA_ROWS, BLOCK_M if part == 0 else TAIL, BLOCK_N, STAGES if part == 0 else 1,
        )  # fmt: skip
    if VARLEN:
        token = first_k
    else:
        token = batch * seqlen_k
    at = (token + col[:, None]) * nheads_kv + kv_head
    tl.store(
        dk_ptr + at * HEAD_DIM + feature[None, :],
        (dk * softmax_scale).to(dk_ptr.dtype.element_ty),
        mask=there[:, None] & (feature[None, :] < HEAD_DIM),
    )
    tl.store(
        dv_ptr + at * HEAD_DIM_V + feature_v[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=there[:, None] & (feature_v[None, :] < HEAD_DIM_V),
    )


@triton.jit
def _walk_keys(
    dq, q, do, lse2, delta, k_base, v_base, k_desc, v_desc, k_row, k_col, v_row, v_col,
    bias_base, bias_desc, bias_row, bias_col, dbias_ptrs, there_row, key_mask_ptrs, rng_ptr,
    start, end, first_row, seqlen_q, seqlen_k, stride_ks, stride_kd, stride_vs, stride_vd, stride_bq, stride_bk,
    stride_mk, row, sheet, slope, shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    EDGE: tl.constexpr, CUT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DBIAS: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys from start to end; CUT blocks have keys past the last, zeros."""
    lane = tl.arange(0, BLOCK_N)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        col = first + lane
        there = col < seqlen_k
        ahead = tl.cast(first, tl.int64)
        k = walked_tile(
            k_base, k_desc, first, stride_ks, stride_kd, k_row, k_col, seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, CUT, TMA
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        bias = 0.0
        if BIAS:
            bias = bias_tile(
                bias_base, bias_desc, first_row, first, bias_row, bias_col, stride_bq, stride_bk, seqlen_q, seqlen_k,
                BLOCK_M, BLOCK_N, CUT, CUT, BIAS,
            )  # fmt: skip
        seen = there[None, :]
        if KEY_MASK:  # what is masked may hold anything
            key_seen = tl.load(key_mask_ptrs + ahead * stride_mk, mask=there, other=0) != 0
            seen = key_seen[None, :]
            k = tl.where(key_seen[:, None], k, 0.0)
        p, cap_slope = weights(
            s, row[:, None], col[None, :], first, seen, lse2[:, None], shift, window_left, window_right, scale, softcap,
            slope, bias, EDGE, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS, KEY_MASK,
        )  # fmt: skip
        if CUT:  # the weight of a zero key, exp2(-lse2), may be inf
            p = tl.where(there[None, :], p, 0.0)
        v = walked_tile(
            v_base, v_desc, first, stride_vs, stride_vd, v_row, v_col, seqlen_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, CUT,
            TMA,
        )  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(rng_ptr, threshold, sheet, row, first, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if DBIAS:  # what no weight is given to may hold anything
            dbias = tl.where(p == 0.0, 0.0, ds).to(dbias_ptrs.dtype.element_ty)
            tl.store(dbias_ptrs + first, dbias, mask=there_row[:, None] & there[None, :] if CUT else there_row[:, None])
        if SOFTCAP:
            ds *= cap_slope
        if KEY_MASK:
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _queries_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, k_desc, k_per_batch, k_per_head, k_col_head,
    v_desc, v_per_batch, v_per_head, v_col_head,
    bias_desc, bias_per_batch, bias_per_head, bias_col_head, dq_ptr, dbias_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_db, stride_ds, stride_dh, stride_dd, stride_row,
    seqlen_q, seqlen_k, nheads_q, softmax_scale, stride_gb, stride_gh, stride_gq,
    bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
    shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, USED: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and dbias where no other program adds to it."""
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = tl.program_id(0) % blocks
    if RIGHT:
        block = blocks - 1 - block
    sheet = (tl.program_id(0) // blocks).to(tl.int64)
    batch = sheet // nheads_q
    head = sheet % nheads_q
    kv_head = head // GROUP
    first_row = block * BLOCK_M
    if VARLEN:
        first_q, seqlen_q, first_k, seqlen_k, shift = sequence_of(
            batch, cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k, seqlen_q, seqlen_k, shift, USED, False
        )
        if first_row >= seqlen_q:
            return
        q_ptr += first_q * stride_qs
        do_ptr += first_q * stride_ds
        k_ptr += first_k * stride_ks
        v_ptr += first_k * stride_vs
        if KEY_MASK:
            key_mask_ptr += first_k * stride_mk
    row = first_row + tl.arange(0, BLOCK_M)
    there = row < seqlen_q
    row_read = tl.minimum(row, seqlen_q - 1).to(tl.int64)
    feature = tl.arange(0, BLOCK_D)
    feature_v = tl.arange(0, BLOCK_DV)
    lane = tl.arange(0, BLOCK_N).to(tl.int64)
    q = load_tile(
        q_ptr + batch * stride_qb + head * stride_qh
        + row_read[:, None] * stride_qs + feature[None, :].to(tl.int64) * stride_qd,
        there[:, None], feature[None, :] < HEAD_DIM, False, HEAD_DIM != BLOCK_D,
    )  # fmt: skip
    do = load_tile(
        do_ptr + batch * stride_db + head * stride_dh
        + row_read[:, None] * stride_ds + feature_v[None, :].to(tl.int64) * stride_dd,
        there[:, None], feature_v[None, :] < HEAD_DIM_V, False, HEAD_DIM_V != BLOCK_DV,
    )  # fmt: skip
    if VARLEN:
        row_at = head * stride_row + first_q
    else:
        row_at = sheet * stride_row
    lse2 = tl.load(lse2_ptr + row_at + row_read)
    delta = tl.load(delta_ptr + row_at + row_read)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    k_row, k_col = (batch * k_per_batch + kv_head * k_per_head).to(tl.int32), (kv_head * k_col_head).to(tl.int32)
    v_row, v_col = (batch * v_per_batch + kv_head * v_per_head).to(tl.int32), (kv_head * v_col_head).to(tl.int32)
    if VARLEN:
        k_row += first_k.to(tl.int32)
        v_row += first_k.to(tl.int32)
    bias_base = bias_ptr
    if BIAS:
        bias_base = bias_ptr + batch * stride_bb + head * stride_bh
    bias_row = (batch * bias_per_batch + head * bias_per_head).to(tl.int32)
    bias_col = (head * bias_col_head).to(tl.int32)
    dbias_ptrs = dbias_ptr
    if DBIAS:
        dbias_ptrs = dbias_ptr + batch * stride_gb + head * stride_gh
        dbias_ptrs = dbias_ptrs + row_read[:, None] * stride_gq + lane[None, :]
    key_mask_ptrs = key_mask_ptr
    if KEY_MASK:
        key_mask_ptrs = key_mask_ptr + batch * stride_mb + lane * stride_mk
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)
    last_row = tl.minimum(first_row + BLOCK_M, seqlen_q) - 1
    start, inner_start, inner_end, end = seen_range(
        first_row, last_row, window_left - shift, window_right + shift, seqlen_k, LEFT, RIGHT, BLOCK_N
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Blocks before the inner ones (only a window has such), those, blocks after them, and the one that the end cuts.
    whole_end = whole_blocks(end, inner_end, seqlen_k, EVEN, BLOCK_N)
    for part in tl.static_range(0 if LEFT else 1, 3 if EVEN else 4):
        if part != 2 or LEFT or RIGHT:
            first, last = part_of(part, start, inner_start, inner_end, whole_end, end)
            dq = _walk_keys(
                dq, q, do, lse2, delta, k_base, v_base, k_desc, v_desc, k_row, k_col, v_row, v_col, bias_base,
                bias_desc, bias_row, bias_col, dbias_ptrs, there, key_mask_ptrs, rng_ptr,
                first, last, first_row, seqlen_q, seqlen_k, stride_ks, stride_kd, stride_vs, stride_vd, stride_bq,
                stride_bk, stride_mk, row, sheet,
                slope, shift, window_left, window_right, scale, softcap, threshold, kept_scale,
                part != 1, part == 3, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, ALIBI, BIAS,
                KEY_MASK, DROPOUT, PRECISION, DBIAS, TMA, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    if VARLEN:
        token = first_q
    else:
        token = batch * seqlen_q
    at = (token + row[:, None]) * nheads_q + head
    tl.store(
        dq_ptr + at * HEAD_DIM + feature[None, :],
        (dq * softmax_scale).to(dq_ptr.dtype.element_ty),
        mask=there[:, None] & (feature[None, :] < HEAD_DIM),
    )


_keys_bwd = Launcher(_keys_bwd_kernel)
_queries_bwd = Launcher(_queries_bwd_kernel)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    attn_bias: Tensor | None, alibi_slopes: Tensor | None, attn_sink: Tensor | None, key_mask: Tensor | None,
    rng_state: Tensor | None, softmax_scale: float, window_left: int, window_right: int, bottom_right: bool,
    softcap: float, dropout_p: float, deterministic: bool, need_dq: bool, need_dkv: bool,
    need_dbias: bool, need_dsink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias and dsink, contiguous in the inputs' shapes and dtypes; empty where not needed."""
    problem = Problem(
        q, k, v, attn_bias, alibi_slopes, attn_sink, key_mask, rng_state, softmax_scale, window_left, window_right,
        bottom_right, softcap, dropout_p,
    )  # fmt: skip
    return run(problem, do, dlse, out, lse, need_dq, need_dkv, need_dbias, need_dsink)


def run(
    problem: Problem, do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, need_dq: bool, need_dkv: bool,
    need_dbias: bool, need_dsink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward with the default configurations."""
    q, k, v, attn_bias, attn_sink = problem.q, problem.k, problem.v, problem.attn_bias, problem.attn_sink
    unused = problem.packed is not None and problem.packed.seqused_k is not None  # keys, of which no program is
    dq = torch.empty(q.shape if need_dq else 0, dtype=q.dtype, device=q.device)
    dk, dv = (
        (torch.zeros if unused else torch.empty)(x.shape if need_dkv else 0, dtype=x.dtype, device=x.device)
        for x in (k, v)
    )
    dbias, dsink = (
        torch.zeros(x.shape if needed else 0, dtype=x.dtype, device=x.device) if x is not None else q.new_empty(0)
        for x, needed in ((attn_bias, need_dbias), (attn_sink, need_dsink))
    )
    rows, sink_part = bwd_rows.run(problem, do, dlse, out, lse, need_dsink and attn_sink is not None)
    held = (do, rows)
    if dk.numel() or dv.numel():
        _launch_keys(problem, held, dk, dv, backward_keys_config(problem))
    need_dbias = need_dbias and dbias.numel() > 0 and q.numel() > 0 and k.numel() > 0
    own = need_dbias and problem.has_bias_of_every_score()
    if dq.numel() or own:
        _launch_queries(
            problem, held, dq if need_dq else torch.empty_like(q), dbias if own else None,
            backward_queries_config(problem),
        )  # fmt: skip
    if need_dbias and not own:
        bwd_bias.run(problem, held, dbias, backward_bias_config(problem))
    if sink_part is not None and q.numel():
        dsink = sink_part.sum((0, 2)).to(dsink.dtype)
    return dq, dk, dv, dbias, dsink


def _walked(
    problem: Problem, config: BackwardConfig, *tensors: tuple[Tensor, int]
) -> tuple[dict[str, Any], list[Walked]]:
    """The kernel's constants, and what goes by TMA: the tensors, all or none, and last the bias."""
    found = [walked(x, block) for x, block in tensors]
    tma = config.tma and all(one.descriptor is not None for one in found)
    bias = walked_bias(problem, config.block_m, config.block_n) if config.tma_bias else BY_POINTERS
    found = [*(found if tma else [BY_POINTERS] * len(found)), bias]
    constants = {**problem.backward_constants(), "TMA": tma}
    if bias.descriptor is not None:
        constants["BIAS"] = BIAS_BY_TMA.value
    return constants, found


def _arguments(found: Sequence[Walked]) -> list[Any]:
    return [argument for one in found for argument in one.arguments]


def _launch_keys(problem: Problem, held: Held, dk: Tensor, dv: Tensor, config: BackwardConfig) -> None:
    seqlen_q, seqlen_k, nheads_q, nheads_kv = problem.seqlen_q, problem.seqlen_k, problem.q.shape[2], problem.k.shape[2]
    # Else the last block reaches into the next sequence.
    even = problem.even_queries(config.block_m)
    do, rows = held
    constants, (*descriptors, bias) = _walked(problem, config, (problem.q, config.block_m), (do, config.block_m))
    # A sequence may begin between the multiples of 16 bytes that TMA reads from.
    tma_rows = constants["TMA"] and config.tma_rows and problem.packed is None
    of_rows = walked_rows(rows, config.block_m) if tma_rows else None
    if not (programs := problem.batch * nheads_kv * triton.cdiv(seqlen_k, config.block_n)):
        return
    _keys_bwd.launch(
        (programs, 1, 1),
        problem.q.device,
        (
            *tensors_of(
                problem, held, *_arguments(descriptors), of_rows, rows.shape[1] * rows.shape[2], *bias.arguments, dk, dv
            ),
            seqlen_q, seqlen_k, nheads_q, problem.softmax_scale, *problem.options(),
        ),
        constants
        | {
            "TMA_ROWS": tma_rows,
            "EVEN": even,
            "SHARED_BIAS": problem.attn_bias is not None and problem.attn_bias.shape[0] == 1 and problem.batch > 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
    )  # fmt: skip


def _launch_queries(problem: Problem, held: Held, dq: Tensor, dbias: Tensor | None, config: BackwardConfig) -> None:
    seqlen_q, seqlen_k, nheads_q = problem.seqlen_q, problem.seqlen_k, problem.q.shape[2]
    if not (programs := problem.batch * nheads_q * triton.cdiv(seqlen_q, config.block_m)):
        return
    constants, descriptors = _walked(problem, config, (problem.k, config.block_n), (problem.v, config.block_n))
    _queries_bwd.launch(
        (programs, 1, 1),
        problem.q.device,
        (
            *tensors_of(problem, held, *_arguments(descriptors), dq, dbias),
            seqlen_q, seqlen_k, nheads_q, problem.softmax_scale,
            *((0, 0, 0) if dbias is None else dbias.stride()[:3]), *problem.options(),
        ),
        constants
        | {
            "EVEN": problem.even_keys(config.block_n),
            "DBIAS": dbias is not None,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
    )  # fmt: skip
