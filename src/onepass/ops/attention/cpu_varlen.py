"""attention_varlen by the C++ kernels of attention, one sequence after the other; what they read is never copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onepass.core import launches
from onepass.ops.attention import by_sequence, cpu


def forward(*call: Any) -> tuple[Tensor, Tensor]:
    """out (total_q, nheads_q, head_dim_v) and lse (nheads_q, total_q), for the arguments of attention_varlen_fwd."""
    _refuse_replays()
    return by_sequence.forward(_forward, *call)


def backward(*call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsink, for the arguments of attention_varlen_bwd; empty where not needed."""
    _refuse_replays()
    return by_sequence.backward(_backward, *call)


def _forward(*args: Any, sequence: int) -> tuple[Tensor, Tensor]:
    return cpu.forward(*args)


def _backward(*args: Any, sequence: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.backward(*args)


def _refuse_replays() -> None:
    """What is launched depends on the lengths, which a replay would not look at."""
    if launches.watched:
        launches.tell(None)
