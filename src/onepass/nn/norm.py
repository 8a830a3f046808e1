"""RMSNorm and LayerNorm: torch.nn's modules over onepass's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepass.ops.norm.api import layer_norm, rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over `onepass.rms_norm`: its constructor, defaults, parameters and state_dict; see there.

        norm = onepass.nn.RMSNorm(4096)
        y = norm(x)
        y, residual = norm(x, residual=residual)    # residual = x + residual, and y is its norm

    eps=None is the twin's: the machine epsilon of the dtype that the statistics are computed in (that of fp32 for fp32,
    bf16 and fp16 inputs). With `offset` the scale is weight + offset: 1.0 for Gemma's weights, which start as zeros
    then. `backend` as in `onepass.rms_norm`.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
        backend: str | None = None,
    ) -> None:
        if offset != 0.0 and not elementwise_affine:
            raise ValueError(f"offset is added to the weight: got offset {offset} and elementwise_affine=False")
        self.offset = offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.backend = backend

    def reset_parameters(self) -> None:
        """Makes the scale 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Any:
        """y in x's shape and dtype; with a residual of x's shape the pair (y, x + residual)."""
        flat, weight, _, flat_residual = _flattened(self, x, self.weight, None, residual)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype is torch.float64 else torch.float32).eps
        result = rms_norm(flat, weight, eps=eps, offset=self.offset, residual=flat_residual, backend=self.backend)
        return _unflattened(result, x)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", offset={self.offset}" if self.offset else "") + _named(self.backend)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over `onepass.layer_norm`: its constructor, defaults, parameters and state_dict; see there.

    forward(x, residual=residual) returns the pair (y, x + residual), y being the norm of the sum. `backend` as in
    `onepass.layer_norm`.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.backend = backend

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Any:
        """y in x's shape and dtype; with a residual of x's shape the pair (y, x + residual)."""
        flat, weight, bias, flat_residual = _flattened(self, x, self.weight, self.bias, residual)
        result = layer_norm(flat, weight, bias, eps=self.eps, residual=flat_residual, backend=self.backend)
        return _unflattened(result, x)

    def extra_repr(self) -> str:
        return super().extra_repr() + _named(self.backend)


def _named(backend: str | None) -> str:
    return "" if backend is None else f", backend={backend!r}"


def _flattened(
    module: RMSNorm | LayerNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same with normalized_shape's dimensions as one, which is all that the functions know."""
    shape = module.normalized_shape
    if tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape) or x.dim() < len(shape):
        raise ValueError(f"x must be (..., {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if len(shape) == 1:
        return x, weight, bias, residual
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    return (
        x.flatten(-len(shape)),
        None if weight is None else weight.flatten(),
        None if bias is None else bias.flatten(),
        None if residual is None else residual.flatten(-len(shape)),
    )


def _unflattened(result: Any, x: Tensor) -> Any:
    if isinstance(result, tuple):
        return tuple(part.view(x.shape) for part in result)
    return result.view(x.shape)
