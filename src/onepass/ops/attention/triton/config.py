"""How the attention kernels are cut. Every constant that tuning may change is here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onepass.core import device

if TYPE_CHECKING:
    from onepass.ops.attention.triton.problem import Problem


class Schedule(Enum):
    """Which tiles a program takes."""

    ONE = "one"
    FIXED = "fixed"  # persistent: every so-many-th
    DYNAMIC = "dynamic"  # persistent: the next that nobody has taken


@dataclass(frozen=True)
class ForwardConfig:
    """block_m queries of a head against block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    schedule: Schedule = Schedule.ONE
    programs_per_processor: int = 1  # persistent schedules only
    tma: bool = True  # where it can be


@dataclass(frozen=True)
class BackwardConfig:
    """One of the two kernels of the backward: block_m queries and block_n keys, one of them held, the other walked."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = True  # where it can be


@dataclass(frozen=True)
class DecodeConfig:
    """Keys of a step, and how splits are chosen."""

    block_n: int
    num_warps: int
    num_stages: int
    most_rows: int = 64  # queries times heads of a group in one tile
    most_splits: int = 128
    programs_per_processor: int = 1


def _machine(tensor: Tensor) -> str:
    """A kind of GPU, by the shared memory and matrix instructions that a configuration counts on."""
    arch = device.arch(tensor)
    if arch.startswith("gfx"):
        return "amd"
    return "hopper" if arch.startswith("sm_") and 90 <= int(arch[3:]) < 120 else "ampere"


def _width(q: Tensor, v: Tensor) -> int:
    """The class of head dimensions: 64, 128 or 256 at most."""
    size = max(q.shape[3], v.shape[3])
    return 64 if size <= 64 else 128 if size <= 128 else 256


# By machine, width and whether later keys are masked; none spills registers. The figures are an H200's, in bf16, at
# 4096 queries and keys; entries without one have not been measured.
_FORWARD = {
    ("hopper", 64, False): ForwardConfig(64, 64, 4, 3, tma=False),  # 457 TFLOP/s
    ("hopper", 64, True): ForwardConfig(64, 64, 4, 3, tma=False),  # 389
    ("hopper", 128, False): ForwardConfig(128, 128, 8, 3),  # 488
    ("hopper", 128, True): ForwardConfig(64, 64, 4, 3, tma=False),  # 445
    ("hopper", 256, False): ForwardConfig(128, 32, 8, 2),
    ("hopper", 256, True): ForwardConfig(128, 32, 8, 2),
    ("ampere", 64, False): ForwardConfig(64, 64, 4, 3),
    ("ampere", 64, True): ForwardConfig(64, 64, 4, 3),
    ("ampere", 128, False): ForwardConfig(128, 64, 8, 2),
    ("ampere", 128, True): ForwardConfig(128, 64, 8, 2),
    ("ampere", 256, False): ForwardConfig(64, 32, 8, 1),
    ("ampere", 256, True): ForwardConfig(64, 32, 8, 1),
    ("amd", 64, False): ForwardConfig(128, 64, 4, 1),
    ("amd", 64, True): ForwardConfig(128, 64, 4, 1),
    ("amd", 128, False): ForwardConfig(128, 64, 4, 1),
    ("amd", 128, True): ForwardConfig(128, 64, 4, 1),
    ("amd", 256, False): ForwardConfig(64, 32, 4, 1),
    ("amd", 256, True): ForwardConfig(64, 32, 4, 1),
}
_FORWARD_PACKED = {("ampere", 128): ForwardConfig(128, 32, 8, 2)}  # where finding a sequence takes too many registers
_FORWARD_FP32 = {64: ForwardConfig(64, 32, 4, 1), 128: ForwardConfig(32, 32, 4, 1), 256: ForwardConfig(16, 16, 4, 1)}

# For dk and dv: keys are held, queries walked.
_BACKWARD_KEYS = {
    ("hopper", 64, False): BackwardConfig(64, 64, 4, 2, tma=False),
    ("hopper", 64, True): BackwardConfig(64, 64, 4, 2, tma=False),
    ("hopper", 128, False): BackwardConfig(64, 128, 8, 2),
    ("hopper", 128, True): BackwardConfig(64, 64, 8, 2),
    ("hopper", 256, False): BackwardConfig(32, 32, 8, 1),
    ("hopper", 256, True): BackwardConfig(32, 32, 8, 1),
    ("ampere", 64, False): BackwardConfig(32, 64, 4, 2),
    ("ampere", 64, True): BackwardConfig(32, 64, 4, 2),
    ("ampere", 128, False): BackwardConfig(64, 64, 8, 1),
    ("ampere", 128, True): BackwardConfig(64, 64, 8, 1),
    ("ampere", 256, False): BackwardConfig(16, 32, 8, 1),
    ("ampere", 256, True): BackwardConfig(16, 32, 8, 1),
    ("amd", 64, False): BackwardConfig(64, 64, 4, 1),
    ("amd", 64, True): BackwardConfig(64, 64, 4, 1),
    ("amd", 128, False): BackwardConfig(32, 64, 4, 1),
    ("amd", 128, True): BackwardConfig(32, 64, 4, 1),
    ("amd", 256, False): BackwardConfig(16, 32, 4, 1),
    ("amd", 256, True): BackwardConfig(16, 32, 4, 1),
}
# The same for packed sequences, which end inside blocks: the checks take registers. None has been measured.
_BACKWARD_KEYS_PACKED = {
    ("hopper", 64): BackwardConfig(32, 64, 4, 2, tma=False),
    ("hopper", 128): BackwardConfig(32, 64, 8, 2, tma=False),
    ("ampere", 64): BackwardConfig(32, 64, 8, 1),
    ("ampere", 128): BackwardConfig(32, 64, 8, 1),
}
# For dq: queries are held, keys walked.
_BACKWARD_QUERIES = {
    ("hopper", 64, False): BackwardConfig(64, 64, 4, 3, tma=False),
    ("hopper", 64, True): BackwardConfig(64, 64, 4, 3, tma=False),
    ("hopper", 128, False): BackwardConfig(64, 64, 4, 2),
    ("hopper", 128, True): BackwardConfig(64, 64, 4, 2),
    ("hopper", 256, False): BackwardConfig(32, 32, 8, 1),
    ("hopper", 256, True): BackwardConfig(32, 32, 8, 1),
    ("ampere", 64, False): BackwardConfig(64, 64, 4, 2),
    ("ampere", 64, True): BackwardConfig(64, 64, 4, 2),
    ("ampere", 128, False): BackwardConfig(64, 32, 4, 1),
    ("ampere", 128, True): BackwardConfig(64, 32, 4, 1),
    ("ampere", 256, False): BackwardConfig(32, 32, 8, 1),
    ("ampere", 256, True): BackwardConfig(32, 32, 8, 1),
    ("amd", 64, False): BackwardConfig(64, 64, 4, 1),
    ("amd", 64, True): BackwardConfig(64, 64, 4, 1),
    ("amd", 128, False): BackwardConfig(64, 32, 4, 1),
    ("amd", 128, True): BackwardConfig(64, 32, 4, 1),
    ("amd", 256, False): BackwardConfig(32, 16, 4, 1),
    ("amd", 256, True): BackwardConfig(32, 16, 4, 1),
}
_BACKWARD_FP32 = {
    64: BackwardConfig(32, 32, 4, 1),
    128: BackwardConfig(16, 32, 4, 1),
    256: BackwardConfig(16, 16, 4, 1),
}
# For dbias: a tile of it is held; stages are not used.
_BACKWARD_BIAS = {
    64: BackwardConfig(64, 64, 4, 1),
    128: BackwardConfig(32, 64, 4, 1),
    256: BackwardConfig(32, 32, 4, 1),
}
_DECODE = {
    ("hopper", 64): DecodeConfig(128, 4, 3),
    ("hopper", 128): DecodeConfig(64, 4, 4),
    ("hopper", 256): DecodeConfig(32, 4, 3),
    ("ampere", 64): DecodeConfig(64, 4, 3),
    ("ampere", 128): DecodeConfig(32, 4, 3),
    ("ampere", 256): DecodeConfig(16, 4, 2),
    ("amd", 64): DecodeConfig(64, 4, 2),
    ("amd", 128): DecodeConfig(32, 4, 2),
    ("amd", 256): DecodeConfig(16, 4, 1),
}


def forward_config(problem: Problem) -> ForwardConfig:
    width = _width(problem.q, problem.v)
    if problem.q.dtype is torch.float32:
        return _FORWARD_FP32[width]
    machine = _machine(problem.q)
    if problem.packed is not None and (machine, width) in _FORWARD_PACKED:
        return _FORWARD_PACKED[machine, width]
    return _FORWARD[machine, width, problem.window_right >= 0]


def backward_keys_config(problem: Problem) -> BackwardConfig:
    width = _width(problem.q, problem.v)
    if problem.q.dtype is torch.float32:
        return _BACKWARD_FP32[width]
    machine = _machine(problem.q)
    if problem.packed is not None and (machine, width) in _BACKWARD_KEYS_PACKED:
        return _BACKWARD_KEYS_PACKED[machine, width]
    return _BACKWARD_KEYS[machine, width, problem.window_right >= 0]


def backward_queries_config(problem: Problem) -> BackwardConfig:
    width = _width(problem.q, problem.v)
    if problem.q.dtype is torch.float32:
        return _BACKWARD_FP32[width]
    return _BACKWARD_QUERIES[_machine(problem.q), width, problem.window_right >= 0]


def backward_bias_config(problem: Problem) -> BackwardConfig:
    width = _width(problem.q, problem.v)
    return _BACKWARD_FP32[width] if problem.q.dtype is torch.float32 else _BACKWARD_BIAS[width]


def decode_config(q: Tensor, head_dim_v: int, groups: int = 0) -> DecodeConfig:
    """`groups`: of features that an int4 cache scales apart, the most of k and v; 0 for other caches."""
    size = max(q.shape[3], head_dim_v)
    width = 64 if size <= 64 else 128 if size <= 128 else 256
    if q.dtype is torch.float32:
        return DecodeConfig(16 if width == 256 else 32, 4, 1, most_rows=16)
    config = _DECODE[_machine(q), width]
    if groups == 0:
        return config
    # A key has a quarter of the bytes, and every group products of its own; neither is measured.
    if groups == 1:
        return replace(config, block_n=min(128, 2 * config.block_n), most_rows=16 if width == 256 else 32)
    return replace(config, block_n=32, most_rows=16)
