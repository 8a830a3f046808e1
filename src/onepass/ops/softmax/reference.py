"""The definition of softmax in plain PyTorch, its backward written out; used only when asked for by name.

y = exp(x - max(x)) / sum(exp(x - max(x)))        dx = y * (dy - sum(dy * y))
"""

import torch
from torch import Tensor

from onepass.core.torch_compat import without_autocast


@without_autocast()
def forward(x: Tensor) -> Tensor:
    """y in x's dtype; sums in fp32 (fp64 for fp64)."""
    wide = _wide(x)
    exponentials = torch.exp(wide - wide.amax(-1, keepdim=True))
    return (exponentials / exponentials.sum(-1, keepdim=True)).to(x.dtype).contiguous()


@without_autocast()
def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx in y's dtype."""
    grad, weights = _wide(dy), _wide(y)
    dx = weights * (grad - (grad * weights).sum(-1, keepdim=True))
    return dx.to(y.dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()
