"""swiglu and geglu on GPUs, forward: each element is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.rows import as_rows
from onepass.core.triton_backend import Launcher
from onepass.ops.swiglu.triton.activation import tile, value_and_slope
from onepass.ops.swiglu.triton.config import forward_config


@triton.jit(do_not_specialize=["rows"])
def _fwd_kernel(
    gate_ptr, up_ptr, out_ptr, rows, columns, stride_gate, stride_up,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = tile(rows, columns, BLOCK_ROWS, BLOCK_COLS)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    tl.store(out_ptr + row * columns + col, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


_fwd = Launcher(_fwd_kernel)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """out in gate's shape and dtype."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    elements = gate.numel()
    if not elements:
        return out
    if gate.is_contiguous() and up.is_contiguous():
        rows, columns, stride_gate, stride_up = 1, elements, elements, elements
    else:
        gate, up = as_rows(gate), as_rows(up)
        rows, columns = gate.shape
        stride_gate, stride_up = gate.stride(0), up.stride(0)
    config = forward_config(columns)
    _fwd.launch(
        (triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_cols), 1, 1),
        out.device,
        (gate, up, out, rows, columns, stride_gate, stride_up),
        {"ACTIVATION": activation, "BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_cols},
        num_warps=config.num_warps,
    )
    return out
