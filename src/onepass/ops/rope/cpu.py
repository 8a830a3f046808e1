"""The C++ kernel of rotary position embedding: packs a call into the argument struct of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES
from onepass.ops.rope.spec import position_error

_CPU = torch.device("cpu")  # whatever torch.set_default_device says

# struct RopeArgs.
_ROPE = struct.Struct("=32q")


def _adjacent(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """q and k, turned; with `inverse` turned back."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=_CPU)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=_CPU)
    batch, seqlen, nheads_q, head_dim = q.shape
    cos, sin = _adjacent(cos), _adjacent(sin)
    rows, half = cos.shape[-2:]
    positions: tuple[int, ...] = (0, 0, 0)
    if position_ids is not None:
        position_ids = position_ids.long()
        positions = (position_ids.data_ptr(), *position_ids.stride())
    arguments = _ROPE.pack(
        DTYPE_CODES[q.dtype], torch.get_num_threads(), batch, seqlen, nheads_q, k.shape[2], head_dim, 2 * half,
        interleaved, inverse, q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(),
        q_out.data_ptr(), k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        *(cos.stride()[:2] if cos.dim() == 3 else (0, cos.stride(0))),
        *(sin.stride()[:2] if sin.dim() == 3 else (0, sin.stride(0))), *positions, rows,
    )  # fmt: skip
    try:
        cpu_library.kernel("rope")(arguments)
    except IndexError:  # the kernel looks at the positions anyway; the words are found here
        assert position_ids is not None
        raise position_error(position_ids, rows) from None
    return q_out, k_out
