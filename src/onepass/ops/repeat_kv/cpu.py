"""The C++ kernels of repeat_kv: packs a call into the argument struct of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES

_CPU = torch.device("cpu")  # whatever torch.set_default_device says

# struct RepeatKvArgs.
_ARGS = struct.Struct("=13q")


def _launch(kernel: str, x: Tensor, nheads_kv: int, n_rep: int, out: Tensor) -> Tensor:
    batch, seqlen, _, head_dim = x.shape
    cpu_library.kernel(kernel)(
        _ARGS.pack(
            DTYPE_CODES[x.dtype], torch.get_num_threads(), batch, seqlen, nheads_kv, head_dim, n_rep,
            x.data_ptr(), *x.stride(), out.data_ptr(),
        )
    )  # fmt: skip
    return out


def forward(x: Tensor, n_rep: int) -> Tensor:
    batch, seqlen, nheads_kv, head_dim = x.shape
    out = torch.empty(batch, seqlen, nheads_kv * n_rep, head_dim, dtype=x.dtype, device=_CPU)
    return _launch("repeat_kv_fwd", x, nheads_kv, n_rep, out)


def backward(dout: Tensor, n_rep: int) -> Tensor:
    batch, seqlen, nheads, head_dim = dout.shape
    dx = torch.empty(batch, seqlen, nheads // n_rep, head_dim, dtype=dout.dtype, device=_CPU)
    return _launch("repeat_kv_bwd", dout, nheads // n_rep, n_rep, dx)
