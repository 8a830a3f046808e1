"""Benchmarks of swiglu and geglu (the tanh approximation, which all peers have) on GPUs and on the CPU."""

from __future__ import annotations

from functools import partial

import torch

import onepass
from onepass.bench import peers
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, Operation, Problem, cpu_groups, gpu_group, host_group
from onepass.bench.registry import Benchmark, Group

ROWS = {"gate": 0, "up": 0, "out": 0}
SWIGLU = Operation("swiglu", onepass.swiglu, peers.SWIGLU, ROWS, ("gate", "up"))
GEGLU = Operation("geglu", partial(onepass.geglu, approximate="tanh"), peers.GEGLU_TANH, ROWS, ("gate", "up"))
BOTH_GATES = (SWIGLU, GEGLU)


def draw(rows: int, columns: int, device: str, dtype: torch.dtype) -> peers.Inputs:
    return {name: torch.randn(rows, columns, device=device, dtype=dtype) for name in ("gate", "up")}


def problem(operation: Operation, rows: int, columns: int) -> Problem:
    tensor = float(rows * columns)
    return Problem(
        operation,
        f"{rows}x{columns}",
        {"rows": rows, "columns": columns},
        partial(draw, rows, columns),
        {FORWARD: 3 * tensor, BACKWARD: 5 * tensor, BOTH: 8 * tensor},
    )


def gpu(direction: str) -> Group:
    bars = {SWIGLU.name: {"gbps": 4250.0, "ratio": 1.0}}
    cases = [
        problem(operation, 16384, 14336).case(
            direction, "cuda", torch.bfloat16, bars.get(operation.name), quick=operation is SWIGLU
        )
        for operation in BOTH_GATES
    ]
    return gpu_group(direction, f"swiglu and geglu, {direction}", cases)


BENCHMARK = Benchmark(
    "swiglu",
    (
        gpu(FORWARD),
        gpu(BACKWARD),
        host_group([problem(operation, 64, 4096) for operation in BOTH_GATES]),
        *cpu_groups([problem(operation, *shape) for operation in BOTH_GATES for shape in ((4096, 4096), (512, 1024))]),
    ),
)
