"""Quantising in plain PyTorch; appending to a quantised cache is `onepass.append_kv`."""

import torch
from torch import Tensor

from onepass.core import checks, kv_formats


def quantize_kv_int4(x: Tensor, *, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Keys or values as `attention_decode` takes them in int4.

    Args:
        x: (..., head_dim), floating point; head_dim is even.
        groups: of adjacent features, each with a scale and shift of its own; it divides head_dim / 2.

    Returns:
        uint8 (..., head_dim / 2), the even feature in the low nibble, and fp16 (..., groups, 2) of (scale, shift):
        a feature is nibble * scale + shift. A group's range is cut into 15 equal steps: a feature is off by half a step
        at most, and by the rounding of scale and shift to fp16. What fp16 cannot hold is cut to its largest number.

    Raises ValueError for shapes that do not fit, TypeError for a dtype.
    """
    checks.require_tensor("x", x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {checks.describe(x)}")
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {groups!r}")
    head_dim = x.shape[-1] if x.dim() else 0
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"x must be (..., head_dim) with an even head_dim, got {checks.shape(x)}")
    if groups < 1 or head_dim // 2 % groups:
        raise ValueError(f"groups must divide head_dim / 2 = {head_dim // 2}, got {groups}")
    with torch.no_grad():
        return kv_formats.quantize_int4(x, groups)
