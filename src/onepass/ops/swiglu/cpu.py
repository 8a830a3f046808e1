"""The C++ kernels of the gated linear units: packs a call into the argument structs of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES
from onepass.core.rows import row_stride

_CPU = torch.device("cpu")  # whatever torch.set_default_device says

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

# struct GluArgs and GluBwdArgs.
_FWD = struct.Struct("=10q")
_BWD = struct.Struct("=13q")


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=_CPU)
    if count := gate.numel():
        columns = gate.shape[-1]
        (gate, stride_gate), (up, stride_up) = row_stride(gate), row_stride(up)
        cpu_library.kernel("glu_fwd")(
            _FWD.pack(
                DTYPE_CODES[gate.dtype], torch.get_num_threads(), count // columns, columns, _ACTIVATIONS[activation],
                gate.data_ptr(), stride_gate, up.data_ptr(), stride_up, out.data_ptr(),
            )
        )  # fmt: skip
    return out


def backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """dgate and dup; empty where not needed."""
    dgate = torch.empty(gate.shape if need_dgate else 0, dtype=gate.dtype, device=_CPU)
    dup = torch.empty(gate.shape if need_dup else 0, dtype=gate.dtype, device=_CPU)
    if (count := gate.numel()) and (need_dgate or need_dup):
        columns = gate.shape[-1]
        dout, stride_dout = row_stride(dout.to(gate.dtype))
        (gate, stride_gate), (up, stride_up) = row_stride(gate), row_stride(up)
        cpu_library.kernel("glu_bwd")(
            _BWD.pack(
                DTYPE_CODES[gate.dtype], torch.get_num_threads(), count // columns, columns, _ACTIVATIONS[activation],
                dout.data_ptr(), stride_dout, gate.data_ptr(), stride_gate, up.data_ptr(), stride_up,
                dgate.data_ptr() if need_dgate else 0, dup.data_ptr() if need_dup else 0,
            )
        )  # fmt: skip
    return dgate, dup
