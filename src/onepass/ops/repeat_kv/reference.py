"""The definition of repeat_kv in plain PyTorch, its backward written out; used only when asked for by name.

out[..., h, :] = x[..., h // n_rep, :]          dx[..., h, :] = sum of dout over the n_rep heads that copied head h
"""

import torch
from torch import Tensor


def forward(x: Tensor, n_rep: int) -> Tensor:
    """out in x's dtype, contiguous."""
    return x.repeat_interleave(n_rep, 2).contiguous()


def backward(dout: Tensor, n_rep: int) -> Tensor:
    """dx in dout's dtype, contiguous."""
    wide = torch.float64 if dout.dtype is torch.float64 else torch.float32
    return dout.unflatten(2, (dout.shape[2] // n_rep, n_rep)).sum(3, dtype=wide).to(dout.dtype).contiguous()
