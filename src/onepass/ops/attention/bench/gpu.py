"""Attention on GPUs, bf16: forward, backward, options, the bias's gradient, and what a call costs the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, first_line
from onepass.bench.registry import Case, Group, Prepared
from onepass.ops.attention.bench.contenders import CUDNN, FLASH, FLASH_4, FLEX, MASK, NAIVE, case
from onepass.ops.attention.bench.problem import Problem
from onepass.testing import numerics

BF16 = torch.bfloat16
MIB = 2.0**20
TO_FLEX, TO_FLASH = f"ratio to {FLEX}", f"ratio to {FLASH}"

# Plain attention. FlexAttention, which compiles for seconds, runs where there is a bar against it.
PLAIN = {  # the problem, full and causal -> bars of its forward, of its backward
    Problem(16, 16, 1024, 128): ({}, {}),
    Problem(4, 16, 4096, 128): ({TO_FLEX: 1.10, TO_FLASH: 1.4}, {TO_FLEX: 1.0}),
    Problem(1, 16, 16384, 128): ({}, {}),
    Problem(4, 32, 4096, 64): ({TO_FLEX: 1.10}, {TO_FLEX: 1.0}),
    Problem(1, 32, 16384, 64): ({}, {}),
    Problem(4, 8, 4096, 256): ({}, {}),
    Problem(1, 8, 16384, 256): ({}, {}),
}
OPTIONS: dict[Problem, tuple[str, ...]] = {  # -> peers
    Problem(1, 16, 16384, 128, causal=True, window=1024): (FLEX, FLASH_4),
    Problem(4, 16, 4096, 128, causal=True, alibi=True): (FLEX,),
    Problem(4, 16, 4096, 128, causal=True, softcap=30.0): (FLEX,),
    Problem(4, 16, 4096, 128, bias=True): (FLEX, MASK),
    Problem(1, 16, 16384, 128, causal=True, mean_length=1024): (FLEX, FLASH_4),
    Problem(4, 32, 4096, 128, heads_kv=8, causal=True): (FLEX, FLASH, CUDNN, FLASH_4),
}
QUICK = Problem(4, 16, 4096, 128, causal=True), Problem(4, 16, 4096, 128, causal=True, alibi=True)
BIAS_GRADIENT = Problem(2, 8, 2048, 64, bias=True, bias_gradient=True)
# The bias's gradient has 64 MiB, all other results have 16; the scores alone would have 128, in bf16.
BIAS_GRADIENT_BARS = {f"ratio to {NAIVE}": 1.0, "peak_bytes": 96 * MIB}


def plain_cases(direction: str) -> list[Case]:
    cases = []
    for problem, bars in PLAIN.items():
        own = bars[0] if direction == FORWARD else bars[1]
        peers = (FLASH, CUDNN, *((FLEX,) if TO_FLEX in own else ()), FLASH_4)
        for masked in (problem, dataclasses.replace(problem, causal=True)):
            cases.append(case(masked, direction, "cuda", BF16, peers, own, quick=masked in QUICK))
    return cases


def option_cases(direction: str) -> list[Case]:
    return [
        case(problem, direction, "cuda", BF16, peers, {TO_FLEX: 1.1}, quick=problem in QUICK)
        for problem, peers in OPTIONS.items()
    ]


def group(name: str, title: str, cases: Sequence[Case], mean_bars: Mapping[str, float] | None = None) -> Group:
    return Group(
        f"cuda-{name}", f"{title}, bf16, on a GPU", tuple(cases), mean_bars=dict(mean_bars or {}), device="cuda"
    )


# Host time.


def host_providers(call: Callable[..., Tensor], peer: Callable[..., Tensor], inputs: list[Tensor]) -> Prepared:
    """A call as users write it, the backend chosen by the library, and PyTorch's on its layout."""
    own = [x.transpose(1, 2).contiguous() for x in inputs]
    providers = {"onepass": partial(call, *inputs), "sdpa": partial(peer, *own)}
    absent: dict[str, str] = {}

    def errors() -> dict[str, float]:
        exact = onepass.attention(*(x.double() for x in inputs), backend="reference")
        rounded = onepass.attention(*inputs, backend="reference")
        found = {"onepass": numerics.error_in_budgets(providers["onepass"](), exact, rounded)}
        try:
            found["sdpa"] = numerics.error_in_budgets(providers["sdpa"]().transpose(1, 2), exact, rounded)
        except Exception as error:
            absent["sdpa"] = first_line(error)
        return found

    return Prepared(providers, errors, absent=absent)


def prepare_host(decode: bool, device: str) -> Prepared:
    heads, length = (32, 1) if decode else (8, 64)
    q = torch.randn(1, length, heads, 64, device=device, dtype=BF16)
    k, v = (torch.randn(1, 64, 8, 64, device=device, dtype=BF16) for _ in range(2))
    call: Any = onepass.attention_decode if decode else onepass.attention
    return host_providers(call, partial(F.scaled_dot_product_attention, enable_gqa=decode), [q, k, v])


def host_case(decode: bool) -> Case:
    name = "decode 1,32/8,64,64" if decode else "forward 1,8,64,64"
    bars = {} if decode else {"seconds": 25e-6}
    return Case(name, {"decode": decode}, "bfloat16", partial(prepare_host, decode, "cuda"), bars=bars, quick=True)


HOST = Group(
    "cuda-host",
    "Host time of a forward call, bf16, no grad",
    (host_case(False), host_case(True)),
    unit="us",
    device="cuda",
    clock="host",
)
GROUPS = (
    group("forward", "Forward", plain_cases(FORWARD)),
    group("backward", "Backward", plain_cases(BACKWARD), {FLEX: 1.05}),
    group("options-forward", "Options, forward", option_cases(FORWARD)),
    group("options-backward", "Options, backward", option_cases(BACKWARD)),
    group(
        "bias-gradient",
        "Forward + backward with the gradient of the bias",
        [case(BIAS_GRADIENT, BOTH, "cuda", BF16, (NAIVE,), BIAS_GRADIENT_BARS, memory=True)],
    ),
)
