"""Attention's options on the CPU, against the ways in which PyTorch's users write them."""

from __future__ import annotations

import dataclasses

import torch

from onepass.bench.problems import BOTH, FORWARD
from onepass.bench.registry import Case, Group
from onepass.ops.attention.bench.contenders import FLEX, LOOP, MASK, NAIVE, PADDED, case
from onepass.ops.attention.bench.problem import Problem

BAR = {"ratio": 1.5}
SEQLENS = (1024, 2048)


def problems_of(seqlen: int) -> dict[Problem, tuple[str, ...]]:
    """-> peers, FlexAttention among them."""
    plain = Problem(1, 8, seqlen, 64)
    masked = dataclasses.replace(plain, causal=True)
    return {
        dataclasses.replace(masked, alibi=True): (MASK, FLEX, NAIVE),
        dataclasses.replace(masked, softcap=30.0): (FLEX, NAIVE),
        dataclasses.replace(masked, window=256): (MASK, FLEX, NAIVE),
        dataclasses.replace(masked, mean_length=256): (PADDED, LOOP, FLEX),
        dataclasses.replace(plain, bias=True): (MASK, FLEX, NAIVE),
    }


def cases(direction: str, dtype: torch.dtype) -> tuple[Case, ...]:
    """The backward takes the bias's gradient, too; FlexAttention has none on the CPU."""
    found = []
    for seqlen in SEQLENS:
        for problem, peers in problems_of(seqlen).items():
            asked, others = problem, peers
            if direction == BOTH:
                asked = dataclasses.replace(problem, bias_gradient=problem.bias)
                others = tuple(peer for peer in peers if peer != FLEX)
            found.append(case(asked, direction, "cpu", dtype, others, BAR, quick=seqlen == SEQLENS[0]))
    return tuple(found)


GROUPS = tuple(
    Group(f"options-{direction}-{short}", f"Options, {direction.replace('-', ' + ')}, {short}", cases(direction, dtype))
    for direction in (FORWARD, BOTH)
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
)
