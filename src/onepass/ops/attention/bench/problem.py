"""One size of attention with its options: its tensors, its flops, and what fp64 says of some of its heads."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass.bench.problems import BACKWARD, BOTH, FORWARD
from onepass.bench.registry import Value
from onepass.ops.attention.error_terms import rounding_terms

# Five matrix products where the forward has two.
FLOPS = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}
CHECKED_PAIRS = 1 << 25  # (query, key) pairs of a case that are compared with fp64, but at least one head's
CHECKED_PIECES = 4


@dataclass(frozen=True)
class Problem:
    """Self-attention of `batch` sequences of `seqlen`; or, with `mean_length`, of `seqlen` tokens in all that are cut
    into sequences of random lengths with that mean (then batch is 1).

    heads_kv: 0 = as many as heads.
    window:   keys that a query sees to its left besides its own; 0 = all. Only with causal.
    bias:     (1, heads, seqlen, seqlen), the same for all sequences; bias_gradient: its gradient is taken, too.
    """

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    heads_kv: int = 0
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    bias: bool = False
    bias_gradient: bool = False
    mean_length: int = 0

    @property
    def kv_heads(self) -> int:
        return self.heads_kv or self.heads

    @property
    def grouped(self) -> bool:
        return self.kv_heads != self.heads

    @property
    def packed(self) -> bool:
        return self.mean_length > 0

    @property
    def option(self) -> str:
        """What is special, in a word or two; empty for plain attention."""
        named = {
            f"window {self.window}": self.window > 0,
            f"softcap {self.softcap:g}": self.softcap > 0,
            "ALiBi": self.alibi,
            "bias": self.bias,
            f"varlen {self.mean_length}": self.packed,
            "GQA": self.grouped,
        }
        return ", ".join(name for name, given in named.items() if given)

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.heads_kv}" if self.grouped else f"{self.heads}"
        shape = f"{self.batch},{heads},{self.seqlen},{self.head_dim}{' causal' if self.causal else ''}"
        return f"{self.option} {shape}" if self.option else shape

    @property
    def params(self) -> dict[str, Value]:
        return {
            "batch": self.batch,
            "heads": self.heads,
            "heads_kv": self.kv_heads,
            "seqlen": self.seqlen,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "option": self.option,
        }

    @property
    def lengths(self) -> list[int]:
        """Of one sequence of the batch, or of all packed ones: random cuts, the same in every run."""
        if not self.packed:
            return [self.seqlen]
        chance = random.Random(self.seqlen)
        cuts = sorted(chance.sample(range(1, self.seqlen), self.seqlen // self.mean_length - 1))
        return [end - start for start, end in pairwise([0, *cuts, self.seqlen])]

    def flops(self, direction: str) -> float:
        """Of the matrix products over the (query, key) pairs that the mask lets through."""
        pairs = sum(map(self._pairs, self.lengths))
        return FLOPS[direction] * 4.0 * self.batch * self.heads * pairs * self.head_dim

    def _pairs(self, seqlen: int) -> int:
        if not self.causal:
            return seqlen * seqlen
        seen = min(seqlen, self.window + 1) if self.window else seqlen
        return seen * (seen + 1) // 2 + (seqlen - seen) * seen

    def options(self, constants: Constants, heads: slice = slice(None)) -> dict[str, Any]:
        """Our options, for some of the query heads; without the bias."""
        found: dict[str, Any] = {"causal": self.causal}
        if self.window:
            found["window_size"] = (self.window, 0)
        if self.softcap:
            found["softcap"] = self.softcap
        if constants.alibi_slopes is not None:
            found["alibi_slopes"] = constants.alibi_slopes[heads]
        return found


# Tensors.


@dataclass(frozen=True)
class Constants:
    """What peers may keep between cases of one problem, and what fixes it: made once."""

    alibi_slopes: Tensor | None  # (heads,)
    attn_bias: Tensor | None  # (1, heads, seqlen, seqlen)
    cu_seqlens: Tensor | None  # int32 (sequences + 1,)


@functools.cache
def constants(problem: Problem, device: str, dtype: torch.dtype) -> Constants:
    slopes = bias = cu_seqlens = None
    if problem.alibi:
        slopes = 2.0 ** (-8.0 * torch.arange(1, problem.heads + 1, device=device) / problem.heads)
    if problem.bias:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, problem.heads, problem.seqlen, problem.seqlen)
        bias = torch.randn(shape, device=device, dtype=dtype, generator=generator)
    if problem.packed:
        ends = torch.tensor([0, *problem.lengths]).cumsum(0)
        cu_seqlens = ends.to(torch.int32).to(device)
    return Constants(slopes, bias, cu_seqlens)


@dataclass(frozen=True)
class Inputs:
    """Random normal, (batch, seqlen, nheads, head_dim), or (total, nheads, head_dim) where sequences are packed."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor


def draw(problem: Problem, device: str, dtype: torch.dtype) -> Inputs:
    tokens = (problem.seqlen,) if problem.packed else (problem.batch, problem.seqlen)
    heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    return Inputs(*(torch.randn(*tokens, n, problem.head_dim, device=device, dtype=dtype) for n in heads))


# Checking: pieces that do not depend on each other.


@dataclass(frozen=True)
class Piece:
    """One KV head with its query heads, of some sequences: of the batch, or the tokens of a packed one."""

    sequences: slice
    head: int

    def heads(self, per_kv_head: int) -> slice:
        return slice(self.head * per_kv_head, (self.head + 1) * per_kv_head)

    def of(self, x: Tensor, problem: Problem) -> Tensor:
        """(sequences, seqlen, its heads, d) of a tensor with heads of queries or of keys."""
        part = x[self.sequences]
        if problem.packed:
            part = part.unsqueeze(0)
        return part[:, :, self.heads(part.shape[2] // problem.kv_heads)]


def pieces(problem: Problem) -> list[Piece]:
    """Those that are compared: evenly chosen, the last among them."""
    if problem.bias_gradient:  # the bias serves the whole batch, which its gradient is summed over
        return [Piece(slice(None), head) for head in sorted({0, problem.kv_heads - 1})]
    sequences = [slice(i, i + 1) for i in range(problem.batch)]
    if problem.packed:
        ends = torch.tensor([0, *problem.lengths]).cumsum(0).tolist()
        sequences = [slice(*ends_of_one) for ends_of_one in pairwise(ends)]
    found = [Piece(sequence, head) for head in range(problem.kv_heads) for sequence in sequences]
    pairs = max(problem.lengths) ** 2 * (problem.heads // problem.kv_heads)
    count = min(len(found), CHECKED_PIECES, max(1, CHECKED_PAIRS // pairs))
    return [found[int(i)] for i in torch.linspace(len(found) - 1, 0, count)]


def select(problem: Problem, piece: Piece, results: Sequence[Tensor]) -> list[Tensor]:
    """A piece of the output, or of the gradients of q, k, v and perhaps the bias, in our layout."""
    bias = [result[:, piece.heads(problem.heads // problem.kv_heads)] for result in results[3:]]
    return [piece.of(result, problem) for result in results[:3]] + bias


def terms(problem: Problem, piece: Piece, inputs: Inputs, fixed: Constants, direction: str) -> list[float]:
    """Of the budgets: those of the bias's gradient, the one result whose elements are no sums over keys or queries."""
    if direction == FORWARD:
        return [0.0]
    if not problem.bias_gradient:
        return [0.0] * 3
    heads = piece.heads(problem.heads // problem.kv_heads)
    used = {name: piece.of(getattr(inputs, name), problem) for name in ("q", "k", "v", "do")}
    if fixed.attn_bias is not None:
        used["attn_bias"] = fixed.attn_bias[:, heads]
    return [0.0] * 3 + [rounding_terms(used, problem.options(fixed, heads))["dattn_bias"]]


def expected(
    problem: Problem, piece: Piece, inputs: Inputs, fixed: Constants, direction: str, dtype: torch.dtype
) -> list[Tensor]:
    """The same by the reference in the given dtype."""
    heads = piece.heads(problem.heads // problem.kv_heads)
    leaves = [piece.of(x, problem).to(dtype) for x in (inputs.q, inputs.k, inputs.v)]
    bias = None if fixed.attn_bias is None else fixed.attn_bias[:, heads].to(dtype)
    taken = [*leaves, bias] if problem.bias_gradient and bias is not None else leaves
    if direction != FORWARD:
        for leaf in taken:
            leaf.requires_grad_()
    with torch.set_grad_enabled(direction != FORWARD):
        out: Tensor = onepass.attention(*leaves, attn_bias=bias, backend="reference", **problem.options(fixed, heads))
    if direction == FORWARD:
        return [out]
    return list(torch.autograd.grad(out, taken, piece.of(inputs.do, problem).to(dtype)))
