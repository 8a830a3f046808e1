"""Benchmarks of repeat_kv on GPUs and on the CPU: 8 heads to 32."""

from __future__ import annotations

from functools import partial

import torch

import onepass
from onepass.bench import peers
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, Operation, Problem, cpu_groups, gpu_group, host_group
from onepass.bench.registry import Benchmark

HEADS, HEAD_DIM, N_REP = 8, 128, 4
REPEAT_KV = Operation("repeat_kv", onepass.repeat_kv, peers.REPEAT_KV, rows={"x": 1, "out": 1}, gradients=("x",))


def draw(batch: int, seqlen: int, device: str, dtype: torch.dtype) -> peers.Inputs:
    return {"x": torch.randn(batch, seqlen, HEADS, HEAD_DIM, device=device, dtype=dtype), "n_rep": N_REP}


def problem(batch: int, seqlen: int) -> Problem:
    tensors = float(batch * seqlen * HEADS * HEAD_DIM * (1 + N_REP))
    return Problem(
        REPEAT_KV,
        f"b{batch} s{seqlen} {HEADS}->{HEADS * N_REP} d{HEAD_DIM}",
        {"batch": batch, "seqlen": seqlen, "heads": HEADS, "n_rep": N_REP, "head_dim": HEAD_DIM},
        partial(draw, batch, seqlen),
        {FORWARD: tensors, BACKWARD: tensors, BOTH: 2 * tensors},
    )


BENCHMARK = Benchmark(
    "repeat_kv",
    (
        *(
            gpu_group(direction, f"repeat_kv, {direction}", [problem(8, 4096).case(direction, "cuda", torch.bfloat16)])
            for direction in (FORWARD, BACKWARD)
        ),
        host_group([problem(1, 64)]),
        *cpu_groups([problem(1, 4096), problem(1, 512)]),
    ),
)
