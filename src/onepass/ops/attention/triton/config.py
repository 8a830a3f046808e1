"""How the attention kernels are cut. Every constant that tuning may change is here; scripts/tune_attention.py times
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

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
    tma_bias: bool = True
    tma_rows: bool = False  # lse and delta of walked queries, too: fewer registers, where they spill


@dataclass(frozen=True)
class DecodeConfig:
    """Keys of a step, and how splits are chosen."""

    block_n: int
    num_warps: int
    num_stages: int
    most_rows: int = 64  # queries times heads of a group in one tile
    most_splits: int = 128
    programs_per_processor: int = 1


_Key = tuple[str, int] | tuple[str, int, str]
_Config = TypeVar("_Config")


def _machines(tensor: Tensor) -> tuple[str, ...]:
    """Kinds of GPU, by the shared memory and matrix instructions that a configuration counts on: what the first has no
    entry for is as on the next.
    """
    arch = device.arch(tensor)
    if arch.startswith("gfx"):
        return ("amd",)
    number = int(arch[3:]) if arch.startswith("sm_") else 0
    return ("blackwell", "hopper") if 100 <= number < 120 else ("hopper",) if 90 <= number < 100 else ("ampere",)


def _width(q: Tensor, head_dim_v: int) -> int:
    """The class of head dimensions: 64, 128 or 256 at most."""
    size = max(q.shape[3], head_dim_v)
    return 64 if size <= 64 else 128 if size <= 128 else 256


# By machine and width, and by what a call has where that needs another (`_needs`). The figures are an H200's, in bf16,
# at 4096 queries and keys, without a mask and causal; entries without one have not been measured.
_FORWARD: Mapping[_Key, ForwardConfig] = {
    ("hopper", 64): ForwardConfig(64, 64, 4, 3),  # 542 and 459 TFLOP/s; with a bias 353
    ("hopper", 64, "careful"): ForwardConfig(64, 128, 4, 2),  # by maxima, without options: 481 and 419
    ("hopper", 64, "bias and dropout"): ForwardConfig(64, 64, 4, 2),
    ("hopper", 128): ForwardConfig(64, 64, 4, 3),  # 599 and 515
    ("hopper", 128, "dropout"): ForwardConfig(64, 64, 4, 2),  # causal 234, with 3 stages 204
    ("hopper", 128, "bias and dropout"): ForwardConfig(64, 64, 4, 2),
    ("hopper", 128, "bias by pointers"): ForwardConfig(128, 32, 8, 3),
    ("hopper", 128, "bias"): ForwardConfig(128, 64, 8, 3),  # 482
    ("hopper", 256): ForwardConfig(128, 64, 8, 2),  # 544 and 460
    ("ampere", 64): ForwardConfig(64, 64, 4, 3),
    ("ampere", 64, "bias and dropout"): ForwardConfig(64, 32, 4, 3),
    ("ampere", 128): ForwardConfig(128, 64, 8, 2),
    ("ampere", 128, "packed"): ForwardConfig(128, 32, 8, 2),
    ("ampere", 128, "bias and dropout"): ForwardConfig(64, 32, 8, 2),
    ("ampere", 128, "dropout"): ForwardConfig(64, 64, 8, 2),
    ("ampere", 128, "scores"): ForwardConfig(128, 32, 8, 2),
    ("ampere", 128, "window"): ForwardConfig(128, 32, 8, 2),
    ("ampere", 256): ForwardConfig(64, 32, 8, 1),
    ("amd", 64): ForwardConfig(128, 64, 4, 1),
    ("amd", 128): ForwardConfig(128, 64, 4, 1),
    ("amd", 256): ForwardConfig(64, 32, 4, 1),
}
# fp32 products are multiply-adds, whose operands lie in registers: at head_dim 128 the backward spills 16 bytes, at 256
# 304.
_FORWARD_FP32 = {64: ForwardConfig(64, 32, 8, 1), 128: ForwardConfig(32, 32, 8, 1), 256: ForwardConfig(16, 16, 4, 1)}

# For dk and dv: keys are held, queries walked.
_BACKWARD_KEYS: Mapping[_Key, BackwardConfig] = {
    ("hopper", 64): BackwardConfig(64, 64, 4, 2),  # 1.86 and 1.03 ms
    ("hopper", 128): BackwardConfig(64, 64, 4, 2),  # 1.63 and 0.89 ms
    ("hopper", 64, "bias by pointers"): BackwardConfig(32, 64, 4, 2),  # 4.07 ms
    ("hopper", 128, "bias by pointers"): BackwardConfig(32, 64, 4, 2),  # 2.87 ms
    ("hopper", 128, "packed bias"): BackwardConfig(32, 64, 4, 2),
    ("hopper", 128, "bias and dropout"): BackwardConfig(32, 64, 4, 2, tma_rows=True),
    ("hopper", 128, "bias"): BackwardConfig(64, 64, 4, 2, tma_rows=True),  # 1.94 ms
    ("hopper", 128, "dropout"): BackwardConfig(32, 64, 4, 2, tma_rows=True),  # causal 2.41 ms
    ("hopper", 128, "masked keys"): BackwardConfig(64, 64, 4, 2),  # 1.82 ms, with tma_rows 1.88
    ("hopper", 128, "scores"): BackwardConfig(64, 64, 4, 2, tma_rows=True),  # causal softcap 1.30 ms, ALiBi 1.01
    ("hopper", 128, "window"): BackwardConfig(64, 64, 4, 2, tma_rows=True),
    ("hopper", 256): BackwardConfig(64, 64, 8, 2),  # 3.35 and 2.10 ms
    ("hopper", 256, "bias and dropout"): BackwardConfig(64, 32, 8, 2, tma_bias=False),  # 8.34 ms, with keys of 64 9.05
    ("hopper", 256, "bias"): BackwardConfig(64, 64, 8, 2, tma_bias=False),  # 3.89 ms, by TMA 4.57
    ("hopper", 256, "dropout"): BackwardConfig(32, 64, 8, 2),  # causal 3.66 ms, with queries of 64 3.70
    ("hopper", 256, "scores"): BackwardConfig(64, 64, 8, 2, tma_rows=True),
    ("blackwell", 256): BackwardConfig(32, 64, 8, 2),  # 64 queries do not fit into its shared memory
    ("ampere", 64): BackwardConfig(32, 64, 4, 2),
    ("ampere", 64, "packed"): BackwardConfig(32, 64, 8, 1),
    ("ampere", 64, "bias and dropout"): BackwardConfig(32, 32, 4, 2),
    ("ampere", 64, "dropout"): BackwardConfig(32, 64, 8, 1),
    ("ampere", 128): BackwardConfig(64, 64, 8, 1),
    ("ampere", 128, "packed"): BackwardConfig(32, 64, 8, 1),
    ("ampere", 128, "bias and dropout"): BackwardConfig(64, 32, 8, 1),
    ("ampere", 256): BackwardConfig(16, 32, 8, 1),
    ("amd", 64): BackwardConfig(64, 64, 4, 1),
    ("amd", 128): BackwardConfig(32, 64, 4, 1),
    ("amd", 256): BackwardConfig(16, 32, 4, 1),
}
# For dq: queries are held, keys walked.
_BACKWARD_QUERIES: Mapping[_Key, BackwardConfig] = {
    ("hopper", 64): BackwardConfig(64, 64, 4, 3),  # 1.31 and 0.72 ms
    ("hopper", 64, "bias by pointers"): BackwardConfig(64, 32, 4, 3),  # 2.32 ms
    ("hopper", 64, "bias and dropout"): BackwardConfig(64, 64, 4, 3),  # 4.55 ms
    ("hopper", 64, "bias"): BackwardConfig(128, 64, 8, 2),  # 2.19 ms, with queries of 64 2.37
    ("hopper", 128): BackwardConfig(64, 64, 4, 2),  # 1.32 and 0.76 ms
    ("hopper", 128, "bias by pointers and dropout"): BackwardConfig(64, 32, 4, 2),  # 3.90 ms, with keys of 64 5.58
    ("hopper", 256): BackwardConfig(128, 32, 8, 2),  # 1.87 and 1.08 ms
    ("ampere", 64): BackwardConfig(64, 64, 4, 2),
    ("ampere", 64, "bias and dropout"): BackwardConfig(32, 64, 4, 2),
    ("ampere", 64, "scores"): BackwardConfig(64, 32, 4, 2),
    ("ampere", 128): BackwardConfig(64, 32, 4, 1),
    ("ampere", 128, "bias"): BackwardConfig(64, 32, 8, 1),
    ("ampere", 256): BackwardConfig(32, 32, 8, 1),
    ("amd", 64): BackwardConfig(64, 64, 4, 1),
    ("amd", 128): BackwardConfig(64, 32, 4, 1),
    ("amd", 256): BackwardConfig(32, 16, 4, 1),
}
_BACKWARD_FP32 = {
    64: BackwardConfig(32, 32, 8, 1),
    128: BackwardConfig(16, 16, 8, 1),
    256: BackwardConfig(16, 16, 8, 1),
}
# For dbias: a tile of it is held; stages are not used.
_BACKWARD_BIAS = {
    64: BackwardConfig(64, 64, 4, 1),
    128: BackwardConfig(64, 32, 4, 1),
    256: BackwardConfig(32, 32, 4, 1),
}
# By machine and width, and by how the cache is stored where that needs another. The figures are an H200's, calls in a
# row, GB/s of a bf16 cache of the same keys: 64 x 8192, 1 x 131072, 16 x 32768 with 32 query and 8 KV heads, 128 x 2048
# with 32.
_DECODE: Mapping[_Key, DecodeConfig] = {
    ("hopper", 64): DecodeConfig(128, 4, 3),
    ("hopper", 128): DecodeConfig(128, 4, 3),  # 4564, 4269, 4609, 4584
    ("hopper", 128, "paged"): DecodeConfig(16, 1, 3, programs_per_processor=8),  # 4475, 4144, 4489, 4570: pages of 16
    ("hopper", 128, "bytes"): DecodeConfig(64, 2, 3, programs_per_processor=4),  # 8793, 7512, 8726, 8703: fp8
    ("hopper", 128, "int4"): DecodeConfig(64, 1, 2, programs_per_processor=8),  # 13815, 10937, 13835, 12728
    ("hopper", 256): DecodeConfig(32, 4, 3),
    ("ampere", 64): DecodeConfig(64, 4, 3),
    ("ampere", 128): DecodeConfig(32, 4, 3),
    ("ampere", 256): DecodeConfig(16, 4, 2),
    ("amd", 64): DecodeConfig(64, 4, 2),
    ("amd", 128): DecodeConfig(32, 4, 2),
    ("amd", 256): DecodeConfig(16, 4, 1),
}


def _chosen(table: Mapping[_Key, _Config], of_fp32: Mapping[int, _Config], problem: Problem) -> _Config:
    width = _width(problem.q, problem.v.shape[3])
    if problem.q.dtype is torch.float32:
        return of_fp32[width]
    needs = list(_needs(problem))
    keys: list[_Key] = []
    for machine in _machines(problem.q):
        keys += [*((machine, width, need) for need in needs), (machine, width)]
    return next(table[key] for key in keys if key in table)


def _needs(problem: Problem) -> Iterator[str]:
    """What of a call may need a configuration of its own, the most demanding first."""
    bias, dropout = problem.attn_bias is not None, problem.dropout_p > 0
    if bias and problem.bias_for_tma is None:
        if dropout:
            yield "bias by pointers and dropout"
        yield "bias by pointers"
    if bias and problem.packed is not None:
        yield "packed bias"
    if bias and dropout:
        yield "bias and dropout"
    if bias:
        yield "bias"
    if dropout:
        yield "dropout"
    if problem.packed is not None:
        yield "packed"
    if problem.key_mask is not None:
        yield "masked keys"
    if bias or dropout or problem.softcap != 0 or problem.alibi_slopes is not None or problem.key_mask is not None:
        yield "scores"  # every score takes more instructions
    elif not problem.lazy:
        yield "careful"
    if problem.window_left >= 0:
        yield "window"


def forward_config(problem: Problem) -> ForwardConfig:
    return _chosen(_FORWARD, _FORWARD_FP32, problem)


def backward_keys_config(problem: Problem) -> BackwardConfig:
    return _chosen(_BACKWARD_KEYS, _BACKWARD_FP32, problem)


def backward_queries_config(problem: Problem) -> BackwardConfig:
    return _chosen(_BACKWARD_QUERIES, _BACKWARD_FP32, problem)


def backward_bias_config(problem: Problem) -> BackwardConfig:
    width = _width(problem.q, problem.v.shape[3])
    return _BACKWARD_FP32[width] if problem.q.dtype is torch.float32 else _BACKWARD_BIAS[width]


def decode_config(
    q: Tensor, head_dim_v: int, *, rows: int, paged: bool, bytes_stored: int, groups: int = 0
) -> DecodeConfig:
    """`rows`: queries times heads of a group. `bytes_stored`: of a number of V. `groups`: of features that an int4
    cache scales apart; 0 for other caches.
    """
    width = _width(q, head_dim_v)
    if q.dtype is torch.float32:
        return DecodeConfig(16 if width == 256 or groups else 32, 4, 1, most_rows=16)
    machine = _machines(q)[-1]
    for stored, given in (
        ("int4", groups == 1 and rows <= 8),
        ("paged", paged and groups == 0),
        ("bytes", bytes_stored == 1 and groups == 0),
    ):
        if given and (machine, width, stored) in _DECODE:
            return _DECODE[machine, width, stored]
    config = _DECODE[machine, width]
    if groups == 0:
        return config
    # A key has a quarter of the bytes, and every group products of its own; neither is measured.
    if groups == 1:
        return replace(config, block_n=min(128, 2 * config.block_n), most_rows=16)
    return replace(config, block_n=32, num_warps=1, most_rows=8, programs_per_processor=8)
