"""The weight's gradient between strips of linear_cross_entropy, in plain PyTorch.

A running sum of fp32 is kept as its upper 16 bits, in the memory of the bf16 or fp16 result, and its lower 16 or the 8
below them in a buffer beside it: the result and a whole fp32 accumulator never lie in memory together.
"""

import torch
from torch import Tensor


def carry(sums: Tensor, lower: Tensor, result: Tensor, first: bool, last: bool) -> None:
    """Adds sums (fp32) to what result and lower carry (nothing yet when `first`); rounds to result when `last`.

    All have one shape and are contiguous; sums is overwritten. lower is int16, or uint8 to keep 24 bits of fp32's 32.
    """
    if not first:
        before = torch.zeros_like(sums)
        for part, kept in zip(_parts(before, lower), (result.view(torch.int16), lower), strict=True):
            part.copy_(kept)
        sums += before
    if last:
        result.copy_(sums)
        return
    for part, kept in zip(_parts(sums, lower), (result.view(torch.int16), lower), strict=True):
        kept.copy_(part)


def _parts(sums: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Views of fp32's upper 16 bits and of the bits that `lower` keeps, on little-endian machines."""
    words = sums.view(torch.int16).unflatten(-1, (-1, 2))
    if lower.dtype is torch.int16:
        return words[..., 1], words[..., 0]
    return words[..., 1], sums.view(torch.uint8).unflatten(-1, (-1, 4))[..., 1]
