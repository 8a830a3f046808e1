"""Benchmarks of rope on GPUs and on the CPU."""

from __future__ import annotations

from functools import partial

import torch

import onepass
from onepass.bench import peers
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, Operation, Problem, cpu_groups, gpu_group, host_group
from onepass.bench.registry import Benchmark

HEAD_DIM = 128
ROPE = Operation(
    "rope", onepass.rope, peers.ROPE, rows={"q": 1, "k": 1, "cos": 0, "sin": 0, "out": 1}, gradients=("q", "k")
)


def draw(batch: int, seqlen: int, heads: int, heads_kv: int, device: str, dtype: torch.dtype) -> peers.Inputs:
    q, k = (torch.randn(batch, seqlen, n, HEAD_DIM, device=device, dtype=dtype) for n in (heads, heads_kv))
    cos, sin = onepass.rope_table(HEAD_DIM, seqlen, device=device)
    return {"q": q, "k": k, "cos": cos, "sin": sin}


def problem(batch: int, seqlen: int, heads: int, heads_kv: int) -> Problem:
    tensors = float(batch * seqlen * (heads + heads_kv) * HEAD_DIM)
    return Problem(
        ROPE,
        f"b{batch} s{seqlen} {heads}/{heads_kv} d{HEAD_DIM}",
        {"batch": batch, "seqlen": seqlen, "heads_q": heads, "heads_kv": heads_kv, "head_dim": HEAD_DIM},
        partial(draw, batch, seqlen, heads, heads_kv),
        {FORWARD: 2 * tensors, BACKWARD: 2 * tensors, BOTH: 4 * tensors},
    )


LARGE = problem(8, 4096, 32, 8)
GPU_BARS = {"gbps": 4100.0, "ratio": 1.02}

BENCHMARK = Benchmark(
    "rope",
    (
        gpu_group("forward", "rope, forward", [LARGE.case(FORWARD, "cuda", torch.bfloat16, GPU_BARS, quick=True)]),
        gpu_group("backward", "rope, backward", [LARGE.case(BACKWARD, "cuda", torch.bfloat16)]),
        host_group([problem(1, 64, 32, 8)]),
        *cpu_groups([problem(1, 4096, 32, 8), problem(1, 512, 8, 2)]),
    ),
)
