"""Benchmarks of rms_norm and layer_norm on GPUs and on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

import onepass
from onepass.bench import peers
from onepass.bench.problems import BACKWARD, BOTH, FORWARD, Operation, Problem, cpu_groups, gpu_group, host_group
from onepass.bench.registry import Benchmark, Case, Group

ROWS = {"x": 0, "out": 0}
RMS_NORM = Operation("rms_norm", onepass.rms_norm, peers.RMS_NORM, ROWS, ("x", "weight"))
LAYER_NORM = Operation("layer_norm", onepass.layer_norm, peers.LAYER_NORM, ROWS, ("x", "weight", "bias"))


def draw(rows: int, columns: int, names: tuple[str, ...], device: str, dtype: torch.dtype) -> peers.Inputs:
    shapes = {"x": (rows, columns), "weight": (columns,), "bias": (columns,)}
    return {name: torch.randn(shapes[name], device=device, dtype=dtype) for name in names}


def problem(operation: Operation, rows: int, columns: int) -> Problem:
    tensor = float(rows * columns)
    return Problem(
        operation,
        f"{rows}x{columns}",
        {"rows": rows, "columns": columns},
        partial(draw, rows, columns, operation.gradients),
        {FORWARD: 2 * tensor, BACKWARD: 3 * tensor, BOTH: 5 * tensor},
    )


def gpu(operation: Operation, direction: str, gbps: Mapping[tuple[int, int], float], ratio: float) -> Group:
    """One group, its bars by shape."""
    cases = [
        problem(operation, *shape).case(
            direction, "cuda", torch.bfloat16, {"gbps": bar, "ratio": ratio}, quick=shape == (32768, 4096)
        )
        for shape, bar in gbps.items()
    ]
    return gpu_group(f"{operation.name}-{direction}", f"{operation.name}, {direction}", cases)


def cpu_bars(case: Case) -> Mapping[str, float]:
    return {"percent_of_bandwidth": 85.0} if case.name == "rms_norm 4096x4096 fp32" and is_forward(case) else {}


def is_forward(case: Case) -> bool:
    return case.params["direction"] == FORWARD


SHORT, MIDDLE, LONG, LONGEST = (32768, 1024), (32768, 4096), (16384, 8192), (4096, 65536)
BOTH_NORMS = (RMS_NORM, LAYER_NORM)

BENCHMARK = Benchmark(
    "norm",
    (
        gpu(RMS_NORM, FORWARD, {SHORT: 3600, MIDDLE: 4000, LONG: 4000, LONGEST: 4000}, 1.0),
        gpu(RMS_NORM, BACKWARD, {SHORT: 3000, MIDDLE: 3700, LONG: 3600, LONGEST: 2900}, 1.12),
        gpu(LAYER_NORM, FORWARD, {MIDDLE: 4000, LONG: 4000, LONGEST: 4000}, 1.05),
        gpu(LAYER_NORM, BACKWARD, {MIDDLE: 3600, LONG: 3500, LONGEST: 2700}, 1.2),
        host_group([problem(operation, 64, 4096) for operation in BOTH_NORMS]),
        *cpu_groups(
            [problem(operation, *shape) for operation in BOTH_NORMS for shape in ((4096, 4096), (512, 1024))],
            more_bars=cpu_bars,
        ),
    ),
)
