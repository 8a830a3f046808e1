"""Benchmarks of softmax on GPUs and on the CPU."""

from __future__ import annotations

from functools import partial

import torch

import onepass
from onepass.bench import peers
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, Operation, Problem, cpu_groups, gpu_group, host_group
from onepass.bench.registry import Benchmark

SOFTMAX = Operation("softmax", onepass.softmax, peers.SOFTMAX, rows={"x": 0, "out": 0}, gradients=("x",))
BF16 = torch.bfloat16


def draw(rows: int, columns: int, device: str, dtype: torch.dtype) -> peers.Inputs:
    return {"x": torch.randn(rows, columns, device=device, dtype=dtype)}


def problem(rows: int, columns: int) -> Problem:
    tensor = float(rows * columns)
    return Problem(
        SOFTMAX,
        f"{rows}x{columns}",
        {"rows": rows, "columns": columns},
        partial(draw, rows, columns),
        {FORWARD: 2 * tensor, BACKWARD: 3 * tensor, BOTH: 5 * tensor},
    )


GPU = {  # rows, columns: GB/s forward and backward, ratio
    (32768, 4096): (4000, 4200, 1.0),
    (16384, 8192): (4000, 4200, 1.0),
    (4096, 65536): (4000, 3550, 0.98),
}

BENCHMARK = Benchmark(
    "softmax",
    (
        gpu_group(
            "forward",
            "softmax, forward",
            [
                problem(*shape).case(FORWARD, "cuda", BF16, {"gbps": gbps, "ratio": ratio}, quick=shape[1] == 4096)
                for shape, (gbps, _, ratio) in GPU.items()
            ],
        ),
        gpu_group(
            "backward",
            "softmax, backward",
            [
                problem(*shape).case(BACKWARD, "cuda", BF16, {"gbps": gbps, "ratio": ratio}, quick=shape[1] == 4096)
                for shape, (_, gbps, ratio) in GPU.items()
            ],
        ),
        host_group([problem(64, 4096)]),
        *cpu_groups([problem(4096, 4096), problem(512, 1024)]),
    ),
)
