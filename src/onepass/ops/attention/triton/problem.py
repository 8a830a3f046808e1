"""A call of attention as the kernels take it: the arguments and constants that forward and backward share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onepass.core import device
from onepass.core.triton_backend import aligned, is_hopper_or_newer
from onepass.ops.attention.triton.tile import ALIBI_BEHIND

LOG2_E = math.log2(math.e)
FAR = 1 << 30  # windows are clamped here, so that 32-bit index arithmetic cannot overflow


TMA_SEQLEN = 1024  # a descriptor costs some 10 us of host time, which only a long sequence hides
LAZY_SEQLEN = 512
_TINY = torch.finfo(torch.float32).tiny


def block_of(size: int) -> int:
    """The power of two that a head dimension is padded to; matrix instructions want 16."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class Packed:
    """Where the sequences of attention_varlen lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None
    page_table: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Problem:
    """The arguments of attention_fwd, checked; packed tensors are one sequence (1, total, nheads, d), pages batches."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_bias: Tensor | None
    alibi_slopes: Tensor | None
    attn_sink: Tensor | None
    key_mask: Tensor | None
    rng_state: Tensor | None
    softmax_scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float
    dropout_p: float
    packed: Packed | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.packed is None else self.packed.cu_seqlens_q.shape[0] - 1

    @property
    def seqlen_q(self) -> int:
        """Of each sequence, or the most of any."""
        total = self.q.shape[1]
        return total if self.packed is None else min(self.packed.max_seqlen_q, total)

    @property
    def seqlen_k(self) -> int:
        total = self.k.shape[1]
        if self.packed is None:
            return total
        if self.packed.page_table is not None:
            total *= self.packed.page_table.shape[1]
        return min(self.packed.max_seqlen_k, total)

    @property
    def paged(self) -> bool:
        return self.packed is not None and self.packed.page_table is not None

    @cached_property
    def lazy(self) -> bool:
        """Whether the forward's weights go by the score of one key, and may be far above 1: bf16 has fp32's range.

        Short walks do not pay for the start, nor do options that take many instructions or registers; ALiBi's scores
        and masked keys leave that range. Measured on Hopper alone; for Blackwell Triton 3.6 does not compile it.
        """
        if device.arch(self.q) != "sm_90":
            return False
        plain = self.softcap == 0.0 and self.alibi_slopes is None and self.key_mask is None and self.dropout_p == 0.0
        return self.q.dtype is torch.bfloat16 and self.seqlen_k >= LAZY_SEQLEN and plain and not self.paged

    @property
    def shift(self) -> int:
        """For packed sequences 1, by which each one's own is multiplied; 0 for the top left."""
        if self.packed is not None:
            return int(self.bottom_right)
        return self.k.shape[1] - self.q.shape[1] if self.bottom_right else 0

    def even_queries(self, block: int) -> bool:
        """Whether blocks of queries end where their sequence does, always."""
        return self.packed is None and self.q.shape[1] % block == 0

    def even_keys(self, block: int) -> bool:
        return self.packed is None and self.k.shape[1] % block == 0

    def has_bias_of_every_score(self) -> bool:
        """Whether the bias is broadcast along nothing."""
        sizes = self.batch, self.q.shape[2], self.seqlen_q, self.seqlen_k
        bias = self.attn_bias
        return bias is not None and all(has >= size for has, size in zip(bias.shape, sizes, strict=True))

    @cached_property
    def bias_for_tma(self) -> Tensor | None:
        """The bias as (batch, seqlen_q, nheads_q, seqlen_k), if TMA can read tiles of it and that pays."""
        bias = self.attn_bias
        if bias is None or bias.shape[2] < TMA_SEQLEN or 1 in bias.shape[2:]:
            return None
        bias = bias.expand(self.batch, self.q.shape[2], -1, -1).transpose(1, 2)
        return bias if _lies_for_tma(bias) else None

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """Of q, k, v, or what has their shape: sequences that are packed lie where cu_seqlens says, pages anywhere."""
        return x.stride() if self.packed is None else (0, *x.stride()[1:])

    def sequences(self) -> tuple[Any, ...]:
        """The arguments of `sequence_of` (tile.py) for packed tensors."""
        packed = self.packed
        if packed is None:
            return (None,) * 5
        table = packed.page_table
        total_k = self.k.shape[1] * (1 if table is None else table.shape[1])
        lengths = (packed.cu_seqlens_q, packed.cu_seqlens_k, packed.seqused_k)
        return *(None if x is None else x.contiguous() for x in lengths), self.q.shape[1], total_k

    @property
    def scale(self) -> float:
        """What products are multiplied by: into softcap's tanh, to scores, or to log2 units where those are all."""
        if self.softcap:
            return self.softmax_scale / self.softcap
        plain = self.attn_bias is None and self.alibi_slopes is None
        return self.softmax_scale * LOG2_E if plain else self.softmax_scale

    def positive_scale(self) -> tuple[float, float]:
        """(a positive scale, the sign that q takes for it), where the largest score is that of the largest product.

        A scale that fp32 cannot hold is 0: q becomes 0.
        """
        if self.scale >= _TINY:
            return self.scale, 1.0
        return (-self.scale, -1.0) if self.scale <= -_TINY else (1.0, 0.0)

    def options(self, scale: float | None = None) -> tuple[Any, ...]:
        """The arguments after q, k, v and the kernel's own: pointers, strides and numbers of the options."""
        bias, slopes, mask = self.attn_bias, self.alibi_slopes, self.key_mask
        return (
            bias,
            slopes,
            mask,
            self.rng_state,
            *(_broadcast_strides(bias) if bias is not None else (0, 0, 0, 0)),
            slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
            slopes.stride(-1) if slopes is not None else 0,
            *(self.strides(mask) if mask is not None else (0, 0)),
            self.shift,
            min(self.window_left, FAR),
            min(self.window_right, FAR),
            self.scale if scale is None else scale,
            self.softcap,
            math.ceil(self.dropout_p * 2**32),
            1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0,
            *self.sequences(),
        )

    def constants(self) -> dict[str, Any]:
        return {
            "GROUP": self.q.shape[2] // self.k.shape[2],
            "HEAD_DIM": self.q.shape[3],
            "HEAD_DIM_V": self.v.shape[3],
            "BLOCK_D": block_of(self.q.shape[3]),
            "BLOCK_DV": block_of(self.v.shape[3]),
            "LEFT": self.window_left >= 0,
            "RIGHT": self.window_right >= 0,
            "SOFTCAP": self.softcap != 0.0,
            "ALIBI": self.alibi_slopes is not None,
            "BIAS": self.attn_bias is not None,
            "KEY_MASK": self.key_mask is not None,
            "DROPOUT": self.dropout_p != 0.0,
            "PRECISION": "tf32" if device.allows_tf32(self.q) else "ieee",
            "VARLEN": self.packed is not None,
            "USED": self.packed is not None and self.packed.seqused_k is not None,
        }

    def backward_constants(self) -> dict[str, Any]:
        """Those of forward, and ALIBI_BEHIND where no query sees ahead, but in fp32, which its roundings would show."""
        behind = self.alibi_slopes is not None and self.window_right == 0 and self.q.dtype is not torch.float32
        return self.constants() | ({"ALIBI": ALIBI_BEHIND.value} if behind else {})


@dataclass(frozen=True)
class Walked:
    """A tensor that a kernel walks token by token, as a matrix for TMA: row and column of (batch, head, token 0)."""

    descriptor: Any
    rows_per_batch: int = 0
    rows_per_head: int = 0
    cols_per_head: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.descriptor, self.rows_per_batch, self.rows_per_head, self.cols_per_head


BY_POINTERS = Walked(None)


def _lies_for_tma(x: Tensor) -> bool:
    """Whether the GPU has TMA, and the rows and heads of x (batch, seqlen, nheads, n) begin where it can read."""
    batch, _, nheads, n = x.shape
    stride_b, stride_s, stride_h, stride_n = x.stride()
    if not is_hopper_or_newer(device.arch(x)) or x.dtype is torch.float32:
        return False
    if stride_n != 1 or stride_s < n or not aligned(x.data_ptr()):
        return False
    if stride_s * x.itemsize % 16 or (batch > 1 and stride_b % stride_s):
        return False
    if nheads == 1:
        return True
    if stride_h >= stride_s:
        return stride_h % stride_s == 0
    return stride_h * x.itemsize % 16 == 0 and (nheads - 1) * stride_h + n <= stride_s


def _matrix(x: Tensor, block: int, width: int) -> Walked:
    """x (batch, seqlen, nheads, n) that lies for TMA: `block` tokens at a time, `width` numbers of each."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, seqlen, nheads, n = x.shape
    stride_b, stride_s, stride_h, _ = x.stride()
    heads_in_row = nheads > 1 and stride_h < stride_s
    per_batch, per_head = stride_b // stride_s if batch > 1 else 0, 0 if heads_in_row else stride_h // stride_s
    cols_per_head = stride_h if heads_in_row else 0
    rows = (batch - 1) * per_batch + (nheads - 1) * per_head + seqlen
    cols = (nheads - 1) * cols_per_head + n
    if rows >= 2**31:
        return BY_POINTERS
    matrix = TensorDescriptor(x, [rows, cols], [stride_s, 1], [block, width])
    return Walked(matrix, per_batch, per_head, cols_per_head)


def walked(x: Tensor, block: int) -> Walked:
    """x (batch, seqlen, nheads, head_dim) for TMA where it can be and pays, `block` tokens at a time."""
    _, seqlen, _, head_dim = x.shape
    if seqlen < TMA_SEQLEN or head_dim != block_of(head_dim) or not _lies_for_tma(x):
        return BY_POINTERS
    return _matrix(x, block, head_dim)


def walked_rows(rows: Tensor, block: int) -> Any:
    """A descriptor of the rows of (..., seqlen) in fp32, one after the other, `block` numbers at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    length = rows.shape[-1]
    return TensorDescriptor(rows, [rows.numel() // length, length], [length, 1], [1, block])


def walked_bias(problem: Problem, block_m: int, block_n: int) -> Walked:
    """The bias by TMA, block_m queries and block_n keys at a time."""
    bias = problem.bias_for_tma
    return BY_POINTERS if bias is None else _matrix(bias, block_m, block_n)


def _broadcast_strides(bias: Tensor) -> list[int]:
    """Strides of the bias as (batch, nheads_q, seqlen_q, seqlen_k): 0 along dimensions that are broadcast."""
    return [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]


def as_words(cache: Tensor, groups: int = 1) -> Tensor | None:
    """A cache of bytes as 16-bit words of the same group of features, or None where it does not lie so."""
    *strides, last = cache.stride()
    numbers = (cache.shape[3] // groups, cache.storage_offset(), cache.data_ptr(), *strides)
    return None if last != 1 or any(number % 2 for number in numbers) else cache.view(torch.int16)


ROW_MULTIPLE = 4  # numbers of fp32 in the 16 bytes that TMA wants between rows
Held = tuple[Tensor, Tensor]  # do; lse in log2 units and delta, (2, batch, nheads_q, seqlen_q or a little more)


def tensors_of(problem: Problem, held: Held, *outputs: Any) -> tuple[Any, ...]:
    """The tensors of a kernel of the backward, then their strides; of lse and delta from row to row."""
    do, rows = held
    q, k, v = problem.q, problem.k, problem.v
    strides = (stride for x in (q, k, v, do) for stride in problem.strides(x))
    return q, k, v, do, *rows, *outputs, *strides, rows.stride(2)
