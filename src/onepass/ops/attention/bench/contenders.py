"""Who computes a problem of attention: ours, and PyTorch's ways to write it, each on its own contiguous layout.

A contender's call takes q, k and v in its layout (and the bias, where its gradient is taken) and returns the output.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

import onepass
from onepass.bench import problems
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, first_line
from onepass.bench.registry import Case, Prepared, SkippedError
from onepass.ops.attention.bench.problem import (
    Constants,
    Inputs,
    Problem,
    constants,
    draw,
    expected,
    pieces,
    select,
    terms,
)
from onepass.testing import numerics

FLASH, CUDNN, FLEX, FLASH_4 = "sdpa flash", "cudnn", "flex", "flash-attn-4"
MASK, PADDED, LOOP, NAIVE = "sdpa mask", "sdpa padded", "sdpa loop", "naive"
GRAPHS = 64  # that torch.compile may keep for one function; each problem of FlexAttention is one


def keep(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Contender:
    """own, ours: from our layout to the contender's, and back.
    training: its forward records autograd, so that one graph of torch.compile serves both directions.
    """

    call: Callable[..., Tensor]
    own: Callable[[Tensor], Tensor] = keep
    ours: Callable[[Tensor], Tensor] = keep
    training: bool = False


Builder = Callable[[Problem, Constants, str, torch.dtype], Contender]


def ours(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    options: dict[str, Any] = {**problem.options(fixed), "backend": problems.BACKENDS[device]}
    if problem.packed:
        longest = max(problem.lengths)
        options |= {"cu_seqlens_q": fixed.cu_seqlens, "cu_seqlens_k": fixed.cu_seqlens}
        return Contender(partial(onepass.attention_varlen, max_seqlen_q=longest, max_seqlen_k=longest, **options))
    if problem.bias_gradient:
        return Contender(lambda q, k, v, bias: onepass.attention(q, k, v, attn_bias=bias, **options))
    return Contender(partial(onepass.attention, attn_bias=fixed.attn_bias, **options))


# Layouts of others.


def heads_first(problem: Problem, call: Callable[..., Tensor], training: bool = False) -> Contender:
    """(batch, nheads, seqlen, d); one sequence of all tokens where they are packed."""
    if problem.packed:
        return Contender(
            call,
            lambda x: x.transpose(0, 1).contiguous().unsqueeze(0),
            lambda x: x.squeeze(0).transpose(0, 1),
            training,
        )
    return Contender(call, lambda x: x.transpose(1, 2).contiguous(), lambda x: x.transpose(1, 2), training)


# Masks and biases as tensors, made before anything is timed.


def visible(problem: Problem, device: str) -> Tensor | None:
    """(seqlen, seqlen), True where a key is seen; None where all are."""
    if not problem.causal:
        return None
    seen = torch.ones(problem.seqlen, problem.seqlen, dtype=torch.bool, device=device).tril()
    return seen.triu(-problem.window) if problem.window else seen


def additive(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores: ALiBi or the bias, -inf where a key is unseen; None where nothing is."""
    added = fixed.attn_bias
    if fixed.alibi_slopes is not None:
        places = torch.arange(problem.seqlen, device=device)
        added = (-fixed.alibi_slopes[:, None, None] * (places[:, None] - places).abs()).to(dtype).unsqueeze(0)
    seen = visible(problem, device)
    return added if added is None or seen is None else added.masked_fill(~seen, float("-inf"))


# PyTorch's scaled_dot_product_attention.


def sdpa(backend: SDPBackend, problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    """One of its kernels, plain or causal."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=problem.grouped)

    return heads_first(problem, call)


def sdpa_mask(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    """Whatever kernel it takes for a mask that is a tensor."""
    mask = additive(problem, fixed, device, dtype)
    if mask is None:
        mask = visible(problem, device)
    attend = partial(F.scaled_dot_product_attention, enable_gqa=problem.grouped)
    if problem.bias_gradient:
        return heads_first(problem, lambda q, k, v, bias: attend(q, k, v, attn_mask=bias))
    return heads_first(problem, partial(attend, attn_mask=mask))


def sdpa_padded(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    """Packed sequences, each padded to the longest."""
    lengths = torch.tensor(problem.lengths, device=device)
    places = torch.arange(problem.seqlen, device=device)
    starts = lengths.cumsum(0) - lengths
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    position = places - starts[sequence]
    longest = max(problem.lengths)
    column = torch.arange(longest, device=device)
    seen = (column < lengths[:, None])[:, None, None]
    if problem.causal:
        seen = seen & (column <= column[:, None])

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(lengths), x.shape[1], longest, x.shape[2])
        padded[sequence, :, position] = x
        return padded

    return Contender(
        partial(F.scaled_dot_product_attention, attn_mask=seen, enable_gqa=problem.grouped),
        pad,
        lambda x: x[sequence, :, position],
    )


def sdpa_loop(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    """Packed sequences, one call each."""
    ends = torch.tensor([0, *problem.lengths]).cumsum(0).tolist()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = partial(F.scaled_dot_product_attention, is_causal=problem.causal, enable_gqa=problem.grouped)
        outs = [attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(ends)]
        return torch.cat(outs, 2)

    return heads_first(problem, call)


def naive(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    """softmax(q k^T) v as one writes it."""
    added = None if problem.bias_gradient else additive(problem, fixed, device, dtype)
    seen = visible(problem, device)
    hidden = None if seen is None or added is not None else ~seen

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if problem.grouped:
            k, v = (x.repeat_interleave(problem.heads // problem.kv_heads, 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if bias is not None:
            scores = scores + bias
        if added is not None:
            scores = scores + added
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.softmax(scores, -1) @ v

    return heads_first(problem, call)


# FlexAttention.


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with static shapes, one graph for each problem."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    functorch.donated_buffer = False  # a backward that runs again must not reuse what it was given
    return torch.compile(call, fullgraph=True, dynamic=False)


def mask_mod(problem: Problem, fixed: Constants) -> Callable[..., Tensor] | None:
    """Which keys a query sees, as FlexAttention asks; None where it sees all."""
    window = problem.window
    if fixed.cu_seqlens is not None:
        lengths = fixed.cu_seqlens.diff()
        document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        if problem.causal:
            return lambda b, h, i, j: (document[i] == document[j]) & (i >= j)
        return lambda b, h, i, j: document[i] == document[j]
    if window:
        return lambda b, h, i, j: (i >= j) & (i - j <= window)
    return (lambda b, h, i, j: i >= j) if problem.causal else None


def score_mod(problem: Problem, fixed: Constants) -> Callable[..., Tensor] | None:
    """What becomes of a score, as FlexAttention asks."""
    slopes, bias, softcap = fixed.alibi_slopes, fixed.attn_bias, problem.softcap
    if slopes is not None:
        return lambda score, b, h, i, j: score - slopes[h] * (i - j).abs()
    if bias is not None:
        table = bias[0]
        return lambda score, b, h, i, j: score + table[h, i, j]
    return (lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)) if softcap else None


@functools.cache
def flex_call(problem: Problem, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Kept, since both directions of a problem shall share one graph."""
    fixed = constants(problem, device, dtype)
    mask = mask_mod(problem, fixed)
    block_mask = None
    if mask is not None:
        block_mask = flex.create_block_mask(mask, None, None, problem.seqlen, problem.seqlen, device=device)
    return partial(
        compiled(flex.flex_attention),
        score_mod=score_mod(problem, fixed),
        block_mask=block_mask,
        enable_gqa=problem.grouped,
    )


def flex_attention(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    return heads_first(problem, flex_call(problem, device, dtype), training=device == "cuda")


# flash-attn-4, on our own layout.


def flash_4_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its two functions; ImportError says that it is not installed (an older flash-attn may be)."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise ImportError("flash_attn.cute is not installed")
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return flash_attn_func, flash_attn_varlen_func


def first(results: Any) -> Tensor:
    """The output, with or without lse behind it."""
    out: Tensor = results[0] if isinstance(results, tuple) else results
    return out


def flash_4(problem: Problem, fixed: Constants, device: str, dtype: torch.dtype) -> Contender:
    dense, varlen = flash_4_functions()
    options: dict[str, Any] = {"causal": problem.causal}
    if problem.window:
        options["window_size"] = (problem.window, 0)
    if problem.packed:
        longest = max(problem.lengths)
        options |= {f"cu_seqlens_{x}": fixed.cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
    function = varlen if problem.packed else dense
    return Contender(lambda q, k, v: first(function(q, k, v, **options)))


BUILDERS: Mapping[str, Builder] = {
    FLASH: partial(sdpa, SDPBackend.FLASH_ATTENTION),
    CUDNN: partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    FLEX: flex_attention,
    FLASH_4: flash_4,
    MASK: sdpa_mask,
    PADDED: sdpa_padded,
    LOOP: sdpa_loop,
    NAIVE: naive,
}

# Setting up and checking.


@dataclass(frozen=True)
class Ready:
    """A contender that can be called; `ours` brings its results into our layout."""

    call: Callable[[], Any]
    ours: Callable[[Tensor], Tensor]

    def results(self) -> list[Tensor]:
        """The output, or the gradients."""
        found = self.call()
        tensors = list(found) if isinstance(found, tuple) else [found]
        return [self.ours(x) for x in tensors[:3]] + tensors[3:]


def set_up(contender: Contender, problem: Problem, inputs: Inputs, fixed: Constants, direction: str) -> Ready:
    leaves = [contender.own(x).detach() for x in (inputs.q, inputs.k, inputs.v)]
    if problem.bias_gradient and fixed.attn_bias is not None:
        leaves.append(fixed.attn_bias.detach())
    if direction != FORWARD or contender.training:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    forward = partial(contender.call, *leaves)
    call: Callable[[], Any] = forward
    if direction == BACKWARD:
        do = contender.own(inputs.do)
        call = partial(torch.autograd.grad, forward(), leaves, do, retain_graph=True)
    elif direction == BOTH:
        do = contender.own(inputs.do)
        call = lambda: torch.autograd.grad(forward(), leaves, do)  # noqa: E731
    return Ready(call, contender.ours)


def refusal(error: onepass.UnsupportedError, backend: str) -> SkippedError:
    """Ours cannot do it: the backend's own reasons, without those of the others."""
    lines = [line.strip() for line in str(error).splitlines()]
    own = [line for line in lines if line.startswith(f"{backend}: ")]
    return SkippedError("; ".join(own or lines))


def prepare(problem: Problem, direction: str, device: str, dtype: torch.dtype, peers: tuple[str, ...]) -> Prepared:
    """Inputs, the calls of all that can run here, and their check."""
    fixed = constants(problem, device, dtype)
    inputs = draw(problem, device, dtype)
    us = problems.OURS[device]
    try:
        own = set_up(ours(problem, fixed, device, dtype), problem, inputs, fixed, direction)
        with torch.set_grad_enabled(direction != FORWARD):
            own.call()
    except onepass.UnsupportedError as error:
        raise refusal(error, problems.BACKENDS[device]) from error
    ready = {us: own}
    absent: dict[str, str] = {}
    training = direction != FORWARD
    for name in peers:
        try:
            contender = BUILDERS[name](problem, fixed, device, dtype)
            ready[name] = set_up(contender, problem, inputs, fixed, direction)
            training = training or contender.training
        except Exception as error:
            absent[name] = first_line(error)

    def errors() -> dict[str, float]:
        return check(problem, direction, inputs, fixed, ready, absent)

    return Prepared({name: one.call for name, one in ready.items()}, errors, training, absent)


def check(
    problem: Problem,
    direction: str,
    inputs: Inputs,
    fixed: Constants,
    ready: Mapping[str, Ready],
    absent: dict[str, str],
) -> dict[str, float]:
    """The worst error of each contender over some pieces, in budgets; a peer that fails goes to `absent` instead."""
    us = next(iter(ready))
    compared = [
        (
            piece,
            expected(problem, piece, inputs, fixed, direction, torch.float64),
            expected(problem, piece, inputs, fixed, direction, inputs.q.dtype),
            terms(problem, piece, inputs, fixed, direction),
        )
        for piece in pieces(problem)
    ]
    found: dict[str, float] = {}
    for name, one in ready.items():
        try:
            results = one.results()
        except Exception as error:
            if name == us:
                raise
            absent[name] = first_line(error)
            continue
        found[name] = max(
            numerics.error_in_budgets(*four)
            for piece, exact, rounded, rounding in compared
            for four in zip(select(problem, piece, results), exact, rounded, rounding, strict=True)
        )
    return found


def case(
    problem: Problem,
    direction: str,
    device: str,
    dtype: torch.dtype,
    peers: tuple[str, ...],
    bars: Mapping[str, float] | None = None,
    **fields: Any,
) -> Case:
    return Case(
        name=problem.name,
        params={**problem.params, "direction": direction},
        dtype=str(dtype).removeprefix("torch."),
        prepare=partial(prepare, problem, direction, device, dtype, peers),
        flops=problem.flops(direction),
        bars=dict(bars or {}),
        **fields,
    )
