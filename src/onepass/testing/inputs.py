"""Random tensors for cases, in the strides that callers bring."""

import torch
from torch import Tensor


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Random normal numbers, drawn on the CPU so that every device sees the same."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def strided(x: Tensor, layout: str) -> Tensor:
    """x's numbers in other strides.

    "contiguous", "sliced" (gaps between rows), "transposed" (the first two dimensions), "strided" (gaps between
    columns), or "expanded" (what the first dimension holds is its first entry throughout).
    """
    if layout == "sliced":
        wide = torch.zeros((*x.shape[:-1], x.shape[-1] + 7), dtype=x.dtype, device=x.device)
        wide[..., 3:-4] = x
        return wide[..., 3:-4]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        wide = torch.zeros((*x.shape, 2), dtype=x.dtype, device=x.device)
        wide[..., 0] = x
        return wide[..., 0]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout != "contiguous":
        raise ValueError(f"no layout is called {layout!r}")
    return x
