"""attention_varlen by the C++ kernels of attention, which take all sequences in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onepass.core import launches
from onepass.ops.attention import cpu
from onepass.ops.attention.spec_varlen import check_varlen_contents


def forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    """out (total_q, nheads_q, head_dim_v) and lse (nheads_q, total_q), for the arguments of attention_varlen_fwd."""
    _refuse_replays()
    check_varlen_contents(q, k, call[0], call[1], call[2], call[3], call[9], call[10])
    return cpu.forward_packed(q, k, v, *call)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsink, for the arguments of attention_varlen_bwd; empty where not needed."""
    _refuse_replays()
    check_varlen_contents(q, k, call[0], call[1], call[2], None, call[8], call[9])
    return cpu.backward_packed(do, dlse, q, k, v, out, lse, *call)


def _refuse_replays() -> None:
    """The lengths are looked at before each call, which a replay would not do."""
    if launches.watched:
        launches.tell(None)
