"""repeat_kv on GPUs, forward and backward: each element is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.repeat_kv.triton.config import config


@triton.jit
def _tile(rows, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The rows (heads of tokens, as they lie in contiguous memory), features and mask of this program."""
    col_blocks: tl.constexpr = (HEAD_DIM + BLOCK_COLS - 1) // BLOCK_COLS
    program = tl.program_id(0)
    row = (program // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = (program % col_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return row, col, (row < rows) & (col < HEAD_DIM)


@triton.jit(do_not_specialize=["rows", "seqlen"])
def _fwd_kernel(
    x_ptr, out_ptr, rows, seqlen, stride_b, stride_s, stride_h, stride_d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, N_REP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(rows, HEAD_DIM, BLOCK_ROWS, BLOCK_COLS)
    token = row // HEADS
    source = token // seqlen * stride_b + token % seqlen * stride_s + row % HEADS * stride_h
    x = tl.load(x_ptr + source + col.to(tl.int64) * stride_d, mask=mask)
    out_ptrs = out_ptr + row * (N_REP * HEAD_DIM) + col
    for _ in range(N_REP):
        tl.store(out_ptrs, x, mask=mask)
        out_ptrs += HEAD_DIM


@triton.jit(do_not_specialize=["rows", "seqlen"])
def _bwd_kernel(
    dout_ptr, dx_ptr, rows, seqlen, stride_b, stride_s, stride_h, stride_d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, N_REP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(rows, HEAD_DIM, BLOCK_ROWS, BLOCK_COLS)
    token = row // HEADS
    source = token // seqlen * stride_b + token % seqlen * stride_s + row % HEADS * N_REP * stride_h
    dout_ptrs = dout_ptr + source + col.to(tl.int64) * stride_d
    dx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for _ in range(N_REP):
        dx += tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
        dout_ptrs += stride_h
    tl.store(dx_ptr + row * HEAD_DIM + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


_fwd = Launcher(_fwd_kernel)
_bwd = Launcher(_bwd_kernel)


def forward(x: Tensor, n_rep: int) -> Tensor:
    """out in x's dtype, contiguous."""
    batch, seqlen, heads, head_dim = x.shape
    out = torch.empty((batch, seqlen, heads * n_rep, head_dim), dtype=x.dtype, device=x.device)
    _launch(_fwd, x, out, heads, n_rep)
    return out


def backward(dout: Tensor, n_rep: int) -> Tensor:
    """dx in dout's dtype, contiguous."""
    batch, seqlen, repeated, head_dim = dout.shape
    dx = torch.empty((batch, seqlen, repeated // n_rep, head_dim), dtype=dout.dtype, device=dout.device)
    _launch(_bwd, dout, dx, repeated // n_rep, n_rep)
    return dx


def _launch(kernel: Launcher, source: Tensor, target: Tensor, heads: int, n_rep: int) -> None:
    if not target.numel():
        return
    batch, seqlen, _, head_dim = source.shape
    rows = batch * seqlen * heads
    cut = config(head_dim)
    kernel.launch(
        (triton.cdiv(rows, cut.block_rows) * triton.cdiv(head_dim, cut.block_cols), 1, 1),
        source.device,
        (source, target, rows, seqlen, *source.stride()),
        {
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "N_REP": n_rep,
            "BLOCK_ROWS": cut.block_rows,
            "BLOCK_COLS": cut.block_cols,
        },
        num_warps=cut.num_warps,
    )
