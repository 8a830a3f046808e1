"""rope on GPUs: q and k in one launch, each element read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.rope.spec import require_positions_in_table
from onepass.ops.rope.triton.config import MOST_REGISTERS, forward_config


@triton.jit
def _turn_tile(
    x_ptr, out_ptr, cos_ptr, sin_ptr, position_ids_ptr, program, tokens, seqlen, positions,
    stride_b, stride_s, stride_h, stride_d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    TABLE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, TABLE_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS x BLOCK_HEADS heads of q or k; programs beside each other do other heads of the same tokens."""
    head_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = (program // head_blocks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = (program % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_token = token < tokens
    in_sequence = token % seqlen
    pair = tl.arange(0, BLOCK_HALF)

    if TABLE == "indexed":
        place = tl.load(position_ids_ptr + token, mask=is_token, other=0).to(tl.int64)
        known = is_token & (place >= 0) & (place < positions)
    else:
        place = token if TABLE == "batched" else in_sequence
        known = is_token
    at = place[:, None, None] * HALF + pair[None, None, :]
    if TABLE_PER_HEAD:  # read again for every head, from the cache, rather than handed around between threads
        at += tl.zeros((1, BLOCK_HEADS, 1), tl.int64)
    seen = known[:, None, None] & (pair < HALF)[None, None, :]
    cos = tl.load(cos_ptr + at, mask=seen, other=float("nan"))
    sin = tl.load(sin_ptr + at, mask=seen, other=float("nan"))
    if INVERSE:
        sin = -sin

    source = (token // seqlen * stride_b + in_sequence * stride_s)[:, None] + head[None, :].to(tl.int64) * stride_h
    target = token[:, None] * (HEADS * HEAD_DIM) + head[None, :] * HEAD_DIM
    is_head = is_token[:, None] & (head < HEADS)[None, :]
    if INTERLEAVED:
        feature = tl.arange(0, 2 * BLOCK_HALF)
        mask = is_head[:, :, None] & (feature < 2 * HALF)[None, None, :]
        x = tl.load(
            x_ptr + source[:, :, None] + feature[None, None, :].to(tl.int64) * stride_d, mask=mask, other=0.0
        ).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, 2)))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), (BLOCK_TOKENS, BLOCK_HEADS, 2 * BLOCK_HALF))
        out = out_ptr + target[:, :, None] + feature[None, None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = is_head[:, :, None] & (pair < HALF)[None, None, :]
        x = x_ptr + source[:, :, None] + pair[None, None, :].to(tl.int64) * stride_d
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF * stride_d, mask=mask, other=0.0).to(tl.float32)
        out = out_ptr + target[:, :, None] + pair[None, None, :]
        tl.store(out, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        mask = is_head[:, :, None] & (rest < HEAD_DIM)[None, None, :]
        x = tl.load(x_ptr + source[:, :, None] + rest[None, None, :].to(tl.int64) * stride_d, mask=mask)
        tl.store(out_ptr + target[:, :, None] + rest[None, None, :], x, mask=mask)


@triton.jit(do_not_specialize=["tokens", "seqlen", "positions", "programs_q"])
def _fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, position_ids_ptr, q_out_ptr, k_out_ptr, tokens, seqlen, positions, programs_q,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    HEADS_Q: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TABLE: tl.constexpr, BLOCK_TOKENS_Q: tl.constexpr,
    BLOCK_HEADS_Q: tl.constexpr, BLOCK_TOKENS_K: tl.constexpr, BLOCK_HEADS_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, TABLE_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """The first programs_q programs turn q, the others k."""
    program = tl.program_id(0)
    if program < programs_q:
        if HEADS_Q > 0:
            _turn_tile(
                q_ptr, q_out_ptr, cos_ptr, sin_ptr, position_ids_ptr, program, tokens, seqlen, positions,
                stride_qb, stride_qs, stride_qh, stride_qd, HEADS_Q, HEAD_DIM, HALF, INTERLEAVED, INVERSE, TABLE,
                BLOCK_TOKENS_Q, BLOCK_HEADS_Q, BLOCK_HALF, BLOCK_REST, TABLE_PER_HEAD,
            )  # fmt: skip
    elif HEADS_KV > 0:
        _turn_tile(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ids_ptr, program - programs_q, tokens, seqlen, positions,
            stride_kb, stride_ks, stride_kh, stride_kd, HEADS_KV, HEAD_DIM, HALF, INTERLEAVED, INVERSE, TABLE,
            BLOCK_TOKENS_K, BLOCK_HEADS_K, BLOCK_HALF, BLOCK_REST, TABLE_PER_HEAD,
        )  # fmt: skip


_fwd = Launcher(_fwd_kernel, MOST_REGISTERS)


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """q and k rotated, contiguous; the tables, which are small, are copied where their strides are unusual."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if position_ids is not None:
        require_positions_in_table(position_ids, cos)
        position_ids = position_ids.contiguous()
    if not (q_out.numel() or k_out.numel()):
        return q_out, k_out
    cos, sin = cos.contiguous(), sin.contiguous()
    _launch(q, k, cos, sin, position_ids, q_out, k_out, interleaved, inverse)
    return q_out, k_out


def _launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    batch, seqlen, heads_q, head_dim = q.shape
    heads_kv, half = k.shape[2], cos.shape[-1]
    tokens = batch * seqlen
    config = forward_config(heads_q, heads_kv, half)
    programs_q = _programs(tokens, heads_q, config.block_tokens_q, config.block_heads_q)
    programs_k = _programs(tokens, heads_kv, config.block_tokens_k, config.block_heads_k)
    table = "indexed" if position_ids is not None else "shared" if cos.dim() == 2 else "batched"
    rest = head_dim - 2 * half
    _fwd.launch(
        (programs_q + programs_k, 1, 1),
        q.device,
        (
            q, k, cos, sin, position_ids, q_out, k_out,
            tokens, seqlen, cos.shape[-2], programs_q, *q.stride(), *k.stride(),
        ),
        {
            "HEADS_Q": heads_q,
            "HEADS_KV": heads_kv,
            "HEAD_DIM": head_dim,
            "HALF": half,
            "INTERLEAVED": interleaved,
            "INVERSE": inverse,
            "TABLE": table,
            "BLOCK_TOKENS_Q": config.block_tokens_q,
            "BLOCK_HEADS_Q": config.block_heads_q,
            "BLOCK_TOKENS_K": config.block_tokens_k,
            "BLOCK_HEADS_K": config.block_heads_k,
            "BLOCK_HALF": config.block_half,
            "BLOCK_REST": 0 if rest == 0 else 1 << (rest - 1).bit_length(),
            "TABLE_PER_HEAD": config.table_per_head,
        },
        num_warps=config.num_warps,
    )  # fmt: skip


def _programs(tokens: int, heads: int, block_tokens: int, block_heads: int) -> int:
    return triton.cdiv(tokens, block_tokens) * triton.cdiv(heads, block_heads)
