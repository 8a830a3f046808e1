"""The definition of attention_varlen: `reference.py` on one sequence after the other."""

from typing import Any

from torch import Tensor

from onepass.ops.attention import by_sequence, reference


def forward(*call: Any) -> tuple[Tensor, Tensor]:
    """out (total_q, nheads_q, head_dim_v) and lse (nheads_q, total_q), for the arguments of attention_varlen_fwd."""
    return by_sequence.forward(reference.forward, *call)


def backward(*call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsink, for the arguments of attention_varlen_bwd; empty where not needed."""
    return by_sequence.backward(reference.backward, *call)
