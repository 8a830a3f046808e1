"""Benchmarks of cross_entropy and linear_cross_entropy on GPUs and on the CPU.

On GPUs forward and backward are one case: some peers make the gradient in the forward, others in the backward.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

import onepass
from onepass.bench import peers
from onepass.bench.problems import BOTH, FORWARD, Operation, Problem, cpu_groups, gpu_group, host_group
from onepass.bench.registry import Benchmark, Group

GIB = 2.0**30
BF16 = torch.bfloat16

CROSS_ENTROPY = Operation(
    "cross_entropy",
    onepass.cross_entropy,
    peers.CROSS_ENTROPY,
    rows={"logits": 0, "target": 0},
    gradients=("logits",),
    target="target",
)
LINEAR = Operation(
    "linear_cross_entropy",
    onepass.linear_cross_entropy,
    peers.LINEAR_CROSS_ENTROPY,
    rows={"x": 0, "target": 0},
    gradients=("x", "weight"),
    target="target",
)
LOW_MEMORY = dataclasses.replace(
    LINEAR, name="linear_cross_entropy, low_memory", call=partial(onepass.linear_cross_entropy, low_memory=True)
)


def draw(rows: int, classes: int, device: str, dtype: torch.dtype) -> peers.Inputs:
    logits = torch.randn(rows, classes, device=device, dtype=dtype)
    return {"logits": logits, "target": torch.randint(classes, (rows,), device=device)}


def problem(rows: int, classes: int) -> Problem:
    tensor = float(rows * classes)
    return Problem(
        CROSS_ENTROPY,
        f"{rows}x{classes}",
        {"rows": rows, "classes": classes},
        partial(draw, rows, classes),
        {FORWARD: tensor, BOTH: 3 * tensor},
    )


def draw_linear(rows: int, features: int, classes: int, device: str, dtype: torch.dtype) -> peers.Inputs:
    """Logits of about unit size."""
    x = torch.randn(rows, features, device=device, dtype=dtype)
    weight = torch.randn(classes, features, device=device, dtype=dtype).mul_(features**-0.5)
    return {"x": x, "weight": weight, "target": torch.randint(classes, (rows,), device=device)}


def linear_problem(operation: Operation, rows: int, features: int, classes: int) -> Problem:
    product = 2.0 * rows * features * classes
    return Problem(
        operation,
        f"{rows}x{features}x{classes}",
        {"rows": rows, "features": features, "classes": classes},
        partial(draw_linear, rows, features, classes),
        flops={FORWARD: product, BOTH: 3 * product},
    )


def linear_gpu() -> Group:
    bars = (
        (LINEAR, {"seconds": 0.040, "ratio to liger": 1.35, "peak_bytes": 2.4 * GIB}),
        (LOW_MEMORY, {"ratio to liger": 1.0, "peak_bytes": 1.3 * GIB}),
    )
    cases = [
        linear_problem(operation, 8192, 4096, 128256).case(BOTH, "cuda", BF16, own, memory=True)
        for operation, own in bars
    ]
    group = gpu_group("linear", "linear_cross_entropy, forward + backward", cases)
    return dataclasses.replace(group, unit="ms")


BENCHMARK = Benchmark(
    "cross_entropy",
    (
        gpu_group(
            BOTH,
            "cross_entropy, forward + backward",
            [
                problem(8192, classes).case(
                    BOTH, "cuda", BF16, {"gbps": 3850, "ratio to quack": 1.04}, quick=classes == 32000
                )
                for classes in (32000, 128256)
            ],
        ),
        linear_gpu(),
        host_group([problem(64, 4096)]),
        *cpu_groups(
            [problem(4096, 4096), problem(512, 1024), linear_problem(LINEAR, 1024, 512, 8192)],
        ),
    ),
)
