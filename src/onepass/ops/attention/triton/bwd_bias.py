"""dbias on GPUs: the sum of ds over whatever the bias was broadcast along, in order and without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.attention.triton.config import BackwardConfig
from onepass.ops.attention.triton.problem import Held, Problem, tensors_of
from onepass.ops.attention.triton.tile import kept, load_tile, sequence_of, weights


@triton.jit
def _bias_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_db, stride_ds, stride_dh, stride_dd, stride_row,
    batch_size, seqlen_q, seqlen_k, nheads_q, stride_gb, stride_gh, stride_gq,
    bias_ptr, slopes_ptr, key_mask_ptr, rng_ptr,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_ab, stride_ah, stride_mb, stride_mk,
    shift, window_left, window_right, scale, softcap, threshold, kept_scale,
    cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, USED: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr, PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of dbias: the sum over all batches, heads, queries and keys that share it (those without PER_)."""
    blocks_m = tl.cdiv(seqlen_q, BLOCK_M)
    blocks_n = tl.cdiv(seqlen_k, BLOCK_N)
    rest = tl.program_id(0)
    first_block_n, last_block_n = 0, blocks_n
    if PER_KEY:
        first_block_n = rest % blocks_n
        last_block_n = first_block_n + 1
        rest = rest // blocks_n
    first_block_m, last_block_m = 0, blocks_m
    if PER_QUERY:
        first_block_m = rest % blocks_m
        last_block_m = first_block_m + 1
        rest = rest // blocks_m
    first_head, last_head = 0, nheads_q
    if PER_HEAD:
        first_head = rest % nheads_q
        last_head = first_head + 1
        rest = rest // nheads_q
    first_batch, last_batch = 0, batch_size
    if PER_BATCH:
        first_batch = rest
        last_batch = rest + 1
    feature = tl.arange(0, BLOCK_D)
    feature_v = tl.arange(0, BLOCK_DV)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch_32 in range(first_batch, last_batch):
        for head_32 in range(first_head, last_head):
            batch = tl.cast(batch_32, tl.int64)
            head = tl.cast(head_32, tl.int64)
            sheet = batch * nheads_q + head
            kv_head = head // GROUP
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + batch * stride_ab + head * stride_ah)
            q_base = q_ptr + batch * stride_qb + head * stride_qh
            do_base = do_ptr + batch * stride_db + head * stride_dh
            k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
            v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
            key_mask_base = key_mask_ptr
            if KEY_MASK:
                key_mask_base = key_mask_ptr + batch * stride_mb
            if VARLEN:  # blocks of the longest sequence that this one lacks add nothing
                first_q, rows, first_k, cols, offset = sequence_of(
                    batch, cu_q_ptr, cu_k_ptr, used_k_ptr, total_q, total_k, seqlen_q, seqlen_k, shift, USED, False
                )
                end_block_m = tl.minimum(last_block_m, tl.cdiv(rows, BLOCK_M))
                end_block_n = tl.minimum(last_block_n, tl.cdiv(cols, BLOCK_N))
                q_base += first_q * stride_qs
                do_base += first_q * stride_ds
                k_base += first_k * stride_ks
                v_base += first_k * stride_vs
                if KEY_MASK:
                    key_mask_base += first_k * stride_mk
                row_at = head * stride_row + first_q
            else:
                rows, cols, offset, end_block_m, end_block_n = seqlen_q, seqlen_k, shift, last_block_m, last_block_n
                row_at = sheet * stride_row
            for block_m in range(first_block_m, end_block_m):
                row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
                row_there = row < rows
                row_read = tl.minimum(row, rows - 1).to(tl.int64)
                q = load_tile(
                    q_base
                    + row_read[:, None] * stride_qs + feature[None, :].to(tl.int64) * stride_qd,
                    row_there[:, None], feature[None, :] < HEAD_DIM, False, HEAD_DIM != BLOCK_D,
                )  # fmt: skip
                do = load_tile(
                    do_base
                    + row_read[:, None] * stride_ds + feature_v[None, :].to(tl.int64) * stride_dd,
                    row_there[:, None], feature_v[None, :] < HEAD_DIM_V, False, HEAD_DIM_V != BLOCK_DV,
                )  # fmt: skip
                lse2 = tl.load(lse2_ptr + row_at + row, mask=row_there, other=float("inf"))
                delta = tl.load(delta_ptr + row_at + row_read)
                for block_n in range(first_block_n, end_block_n):
                    first_col = block_n * BLOCK_N
                    col = first_col + tl.arange(0, BLOCK_N)
                    col_there = col < cols
                    col_read = tl.minimum(col, cols - 1).to(tl.int64)
                    k = load_tile(
                        k_base
                        + col_read[None, :] * stride_ks + feature[:, None].to(tl.int64) * stride_kd,
                        col_there[None, :], feature[:, None] < HEAD_DIM, False, HEAD_DIM != BLOCK_D,
                    )  # fmt: skip
                    v = load_tile(
                        v_base
                        + col_read[None, :] * stride_vs + feature_v[:, None].to(tl.int64) * stride_vd,
                        col_there[None, :], feature_v[:, None] < HEAD_DIM_V, False, HEAD_DIM_V != BLOCK_DV,
                    )  # fmt: skip
                    bias_ptrs = bias_ptr + batch * stride_bb + head * stride_bh
                    bias = tl.load(bias_ptrs + row_read[:, None] * stride_bq + col_read[None, :] * stride_bk)
                    seen = row_there[:, None] & col_there[None, :]
                    if KEY_MASK:
                        key_seen = tl.load(key_mask_base + col_read * stride_mk) != 0
                        seen = seen & key_seen[None, :]
                    s = tl.dot(q, k, input_precision=PRECISION)
                    p, _ = weights(
                        s, row[:, None], col[None, :], first_col, seen, lse2[:, None], offset, window_left,
                        window_right, scale, softcap, slope, bias, True, LEFT, RIGHT, SOFTCAP, ALIBI, True, True,
                    )  # fmt: skip
                    dp = tl.dot(do, v, input_precision=PRECISION)
                    if DROPOUT:
                        keep = kept(rng_ptr, threshold, sheet, row, first_col, BLOCK_M, BLOCK_N, False)
                        dp = tl.where(keep, dp * kept_scale, 0.0)
                    tile += tl.where(p == 0.0, 0.0, p * (dp - delta[:, None]))
    row = first_block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = first_block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dbias_ptrs = dbias_ptr + tl.cast(first_batch, tl.int64) * stride_gb + tl.cast(first_head, tl.int64) * stride_gh
    if PER_QUERY and PER_KEY:
        at = row[:, None].to(tl.int64) * stride_gq + col[None, :]
        mask = (row < seqlen_q)[:, None] & (col < seqlen_k)[None, :]
        tl.store(dbias_ptrs + at, tile.to(dbias_ptr.dtype.element_ty), mask=mask)
    elif PER_KEY:
        tl.store(dbias_ptrs + col, tl.sum(tile, 0).to(dbias_ptr.dtype.element_ty), mask=col < seqlen_k)
    elif PER_QUERY:
        tl.store(
            dbias_ptrs + row.to(tl.int64) * stride_gq,
            tl.sum(tile, 1).to(dbias_ptr.dtype.element_ty),
            mask=row < seqlen_q,
        )
    else:
        tl.store(dbias_ptrs, tl.sum(tl.sum(tile, 1), 0).to(dbias_ptr.dtype.element_ty))


_bias_bwd = Launcher(_bias_bwd_kernel)


def run(problem: Problem, held: Held, dbias: Tensor, config: BackwardConfig) -> None:
    """Fills dbias."""
    batch, seqlen_q, seqlen_k, nheads_q = problem.batch, problem.seqlen_q, problem.seqlen_k, problem.q.shape[2]
    sizes = batch, nheads_q, triton.cdiv(seqlen_q, config.block_m), triton.cdiv(seqlen_k, config.block_n)
    own = [size > 1 for size in dbias.shape]
    programs = 1
    for size, apart in zip(sizes, own, strict=True):
        programs *= size if apart else 1
    _bias_bwd.launch(
        (programs, 1, 1),
        problem.q.device,
        (
            *tensors_of(problem, held, dbias), batch, seqlen_q, seqlen_k, nheads_q, *dbias.stride()[:3],
            *problem.options(),
        ),
        problem.backward_constants()
        | dict(zip(("PER_BATCH", "PER_HEAD", "PER_QUERY", "PER_KEY"), own, strict=True))
        | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps,
    )  # fmt: skip
