"""swiglu and geglu on GPUs, backward: the activation is computed again, from gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher
from onepass.ops.swiglu.triton.activation import tile, value_and_slope
from onepass.ops.swiglu.triton.config import backward_config


@triton.jit(do_not_specialize=["rows"])
def _bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, columns, stride_dout, stride_gate, stride_up,
    ACTIVATION: tl.constexpr, NEED_DGATE: tl.constexpr, NEED_DUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = tile(rows, columns, BLOCK_ROWS, BLOCK_COLS)
    dout = tl.load(dout_ptr + row * stride_dout + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, ACTIVATION)
    if NEED_DGATE:
        up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
        dgate = dout * up * slope
        tl.store(dgate_ptr + row * columns + col, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEED_DUP:
        dup = dout * value
        tl.store(dup_ptr + row * columns + col, dup.to(dup_ptr.dtype.element_ty), mask=mask)


_bwd = Launcher(_bwd_kernel)


def backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """dgate and dup; empty where not needed."""
    dgate = torch.empty(gate.shape if need_dgate else 0, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape if need_dup else 0, dtype=gate.dtype, device=gate.device)
    elements = gate.numel()
    if not elements or not (need_dgate or need_dup):
        return dgate, dup
    if dout.is_contiguous() and gate.is_contiguous() and up.is_contiguous():
        rows, columns = 1, elements
        strides = (elements,) * 3
    else:
        dout, gate, up = as_rows(dout), as_rows(gate), as_rows(up)
        rows, columns = gate.shape
        strides = dout.stride(0), gate.stride(0), up.stride(0)
    config = backward_config(columns)
    _bwd.launch(
        (triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_cols), 1, 1),
        gate.device,
        (dout, gate, up, dgate, dup, rows, columns, *strides),
        {
            "ACTIVATION": activation,
            "NEED_DGATE": need_dgate,
            "NEED_DUP": need_dup,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLS": config.block_cols,
        },
        num_warps=config.num_warps,
    )
    return dgate, dup
