"""SwiGLU and GeGLU as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from onepass.ops.swiglu.api import geglu, swiglu


class _Gated(torch.nn.Module):
    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def packed(self, gate_up: Tensor) -> Tensor:
        """The same on one tensor (..., 2 * columns), gate first, as one fused projection makes it; read in place."""
        if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
            raise ValueError(f"gate_up must be (..., 2 * columns), got {tuple(gate_up.shape)}")
        gate, up = gate_up.chunk(2, -1)
        out: Tensor = self(gate, up)
        return out

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"


class SwiGLU(_Gated):
    """`onepass.swiglu`: silu(gate) * up, the middle of a Llama MLP. It has no weights: projections belong to the model.

        act = onepass.nn.SwiGLU()
        y = self.down_proj(act(self.gate_proj(x), self.up_proj(x)))     # Llama
        y = self.down_proj(act.packed(self.gate_up_proj(x)))            # one fused projection

    Whoever has torch.nn.SiLU there, `self.act_fn(gate) * up`, replaces the product by one call.
    """

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(..., columns) each, to the same."""
        return swiglu(gate, up, backend=self.backend)


class GeGLU(_Gated):
    """`onepass.geglu`: gelu(gate) * up, the middle of a Gemma MLP; otherwise as `SwiGLU`.

    `approximate` is that of torch.nn.GELU: "none" or "tanh" (Gemma).
    """

    def __init__(self, approximate: str = "none", *, backend: str | None = None) -> None:
        super().__init__(backend=backend)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(..., columns) each, to the same."""
        return geglu(gate, up, approximate=self.approximate, backend=self.backend)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"approximate={self.approximate!r}", super().extra_repr())))
