"""Softmax as a module."""

import torch
from torch import Tensor

from onepass.ops.softmax.api import softmax


class Softmax(torch.nn.Module):
    """`onepass.softmax`, with torch.nn.Softmax's constructor; it has no weights.

    dim must be the last dimension: -1, or its number in the inputs that come. (torch.nn.Softmax's default, None, leaves
    the dimension to a rule of long ago; it is refused.)
    """

    def __init__(self, dim: int = -1, *, backend: str | None = None) -> None:
        super().__init__()
        if type(dim) is not int or dim < -1:
            raise ValueError(f"dim must be the last dimension, -1, got {dim!r}: move another there with x.movedim")
        self.dim = dim
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x's shape and dtype. Raises ValueError when dim is not x's last dimension."""
        if self.dim not in (-1, x.dim() - 1):
            raise ValueError(f"dim must be the last dimension of x, -1 or {x.dim() - 1}, got {self.dim}: use x.movedim")
        return softmax(x, backend=self.backend)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.backend is None else f", backend={self.backend!r}")
