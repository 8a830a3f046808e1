"""The C++ kernels of the norms: packs a call into the argument structs of csrc/abi.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.core.cpu_library import DTYPE_CODES
from onepass.core.rows import row_stride
from onepass.ops.norm.spec import sum_dtype

_CPU = torch.device("cpu")  # whatever torch.set_default_device says

# struct NormArgs and NormBwdArgs: q = int64_t or pointer, d = double.
_FWD = struct.Struct("=8q2d10q")
_BWD = struct.Struct("=8qd12q")


def _parameter(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _code(x: Tensor | None) -> int:
    return 0 if x is None else DTYPE_CODES[x.dtype]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, residual_out, mean and rstd as the reference has them; without `statistics` the last two are None."""
    dtype, columns = x.dtype, x.shape[-1]
    weight, bias = _parameter(weight), _parameter(bias)
    y = torch.empty(x.shape, dtype=dtype, device=_CPU)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=_CPU) if statistics else None
    mean = torch.empty(x.shape[:-1] if center else 0, dtype=torch.float32, device=_CPU) if statistics else None
    rows_of_x, stride = row_stride(x)
    residual_out, stride_residual = None, 0
    if residual is not None:
        kind = sum_dtype(x, residual)
        residual_out = torch.empty(x.shape, dtype=kind, device=_CPU)
        residual, stride_residual = row_stride(residual.to(kind))
    elif statistics:
        residual_out = x.new_empty(0)
    cpu_library.kernel("norm_fwd")(
        _FWD.pack(
            DTYPE_CODES[dtype], _code(residual_out), _code(weight), _code(bias), torch.get_num_threads(),
            x.numel() // columns, columns, center, eps, offset,
            rows_of_x.data_ptr(), stride, _pointer(residual), stride_residual, _pointer(weight), _pointer(bias),
            y.data_ptr(), 0 if residual is None else _pointer(residual_out), _pointer(mean), _pointer(rstd),
        )
    )  # fmt: skip
    return y, residual_out, mean, rstd


def backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    center: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (of x + residual, where one was given), dweight and dbias; empty where not needed."""
    dtype, columns = x.dtype, x.shape[-1]
    alike = dy.dtype is dtype or dtype is torch.float32
    if not alike or (dresidual is not None and dresidual.dtype is not dtype):
        # Dtypes that the forward does not bring together; fp32 holds them all.
        wide = None if dresidual is None else dresidual.float()
        dx, dweight, dbias = backward(
            dy.float(), wide, x.float(), weight, bias, mean, rstd, offset, center, need_dx, need_dweight, need_dbias
        )
        return dx.to(dtype), dweight, dbias
    need_dweight, need_dbias = need_dweight and weight is not None, need_dbias and bias is not None
    make = torch.empty if x.numel() else torch.zeros  # without rows nothing is computed
    dx = torch.empty(x.shape if need_dx else 0, dtype=dtype, device=_CPU)
    dweight = make(columns, dtype=weight.dtype, device=_CPU) if need_dweight and weight is not None else x.new_empty(0)
    dbias = make(columns, dtype=bias.dtype, device=_CPU) if need_dbias and bias is not None else x.new_empty(0)
    if not x.numel():
        return dx, dweight, dbias
    weight = _parameter(weight)
    (dy, stride_dy), (x, stride_x) = row_stride(dy), row_stride(x)
    stride_dresidual = 0
    if dresidual is not None:
        dresidual, stride_dresidual = row_stride(dresidual)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    cpu_library.kernel("norm_bwd")(
        _BWD.pack(
            DTYPE_CODES[dtype], DTYPE_CODES[dy.dtype], _code(weight), _code(bias), torch.get_num_threads(),
            x.numel() // columns, columns, center, offset, dy.data_ptr(), stride_dy,
            _pointer(dresidual), stride_dresidual, x.data_ptr(), stride_x, _pointer(weight), mean.data_ptr(),
            rstd.data_ptr(), dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0,
            dbias.data_ptr() if need_dbias else 0,
        )
    )  # fmt: skip
    return dx, dweight, dbias
