"""The weight's gradient between strips of linear_cross_entropy, in plain PyTorch.

A running sum of fp32 is kept as its upper 16 bits, in the memory of the bf16 or fp16 result, and 16, 8 or 4 bits below
them in a buffer beside it: the result and a whole fp32 accumulator never lie in memory together. 4 bits are rounded to
nearest, and lie two to a byte.
"""

import torch
from torch import Tensor


def empty_lower(weight: Tensor, bits: int) -> Tensor:
    """Memory for the lower bits of a gradient of `weight`; its dtype and shape say how many there are."""
    rows, columns = weight.shape
    dtype = torch.int16 if bits == 16 else torch.uint8
    return torch.empty((rows, columns // 2 if bits == 4 else columns), dtype=dtype, device=weight.device)


def lower_bits(lower: Tensor, sums: Tensor) -> int:
    if lower.dtype is torch.int16:
        return 16
    return 8 if lower.shape == sums.shape else 4


def carry(sums: Tensor, lower: Tensor, result: Tensor, first: bool, last: bool) -> None:
    """Adds sums (fp32) to what result and lower carry (nothing yet when `first`); rounds to result when `last`.

    All are contiguous; sums is overwritten. lower is as `empty_lower` makes it.
    """
    upper = result.view(torch.int16)
    if not first:
        sums += _joined(upper, lower, sums)
    if last:
        result.copy_(sums)
        return
    bits = lower_bits(lower, sums)
    words = sums.view(torch.int32)
    if bits == 4:
        rounded = torch.where(sums.isnan(), 0x7FC00000, words + 0x800)
        nibbles = rounded >> 12 & 15
        lower.copy_(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
        upper.copy_(rounded >> 16)
    else:
        lower.copy_(words >> 8 & 255 if bits == 8 else words)
        upper.copy_(words >> 16)


def _joined(upper: Tensor, lower: Tensor, sums: Tensor) -> Tensor:
    """What is carried, as fp32."""
    bits = lower_bits(lower, sums)
    if bits == 4:
        below = torch.stack((lower & 15, lower >> 4), -1).flatten(-2).int() << 12
    elif bits == 8:
        below = lower.int() << 8
    else:
        below = lower.int() & 0xFFFF
    return (upper.int() << 16 | below).view(torch.float32)
