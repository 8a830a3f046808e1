"""The C++ kernels of softmax: packs a call into the argument structs of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES
from onepass.core.rows import row_stride

_CPU = torch.device("cpu")  # whatever torch.set_default_device says

# struct SoftmaxArgs and SoftmaxBwdArgs.
_FWD = struct.Struct("=7q")
_BWD = struct.Struct("=9q")


def forward(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=_CPU)
    if count := x.numel():
        columns = x.shape[-1]
        x, stride = row_stride(x)
        cpu_library.kernel("softmax_fwd")(
            _FWD.pack(
                DTYPE_CODES[x.dtype], torch.get_num_threads(), count // columns, columns,
                x.data_ptr(), stride, y.data_ptr(),
            )
        )  # fmt: skip
    return y


def backward(dy: Tensor, y: Tensor) -> Tensor:
    dx = torch.empty(y.shape, dtype=y.dtype, device=_CPU)
    if count := y.numel():
        columns = y.shape[-1]
        (dy, stride_dy), (y, stride_y) = row_stride(dy.to(y.dtype)), row_stride(y)
        cpu_library.kernel("softmax_bwd")(
            _BWD.pack(
                DTYPE_CODES[y.dtype], torch.get_num_threads(), count // columns, columns,
                dy.data_ptr(), stride_dy, y.data_ptr(), stride_y, dx.data_ptr(),
            )
        )  # fmt: skip
    return dx
