"""RotaryEmbedding and RepeatKV as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from onepass.ops.repeat_kv.api import repeat_kv
from onepass.ops.rope.api import rope
from onepass.ops.rope.table import RopeScaling, rope_table


class RotaryEmbedding(torch.nn.Module):
    """`onepass.rope` with its table: q and k in, q and k turned by their positions out.

        rotary = onepass.nn.RotaryEmbedding(128, 8192, base=500000.0, scaling=onepass.RopeScaling())
        q, k = rotary(q, k)                                 # positions 0, 1, ...
        q, k = rotary(q, k, start=cache_len)                # positions cache_len, cache_len + 1, ...
        q, k = rotary(q, k, position_ids=position_ids)      # (batch, seqlen): of each token its own

    rotary_dim: how many features of each head are turned; even, at most head_dim. max_seqlen: how many positions the
    table holds; None: it is computed at every call. base, scaling, device: as in `onepass.rope_table`. interleaved,
    backend: as in `onepass.rope`.

    The table (buffers cos and sin) is no part of the state_dict and stays fp32 when the module is converted.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_seqlen: int | None = None,
        *,
        base: float = 10000.0,
        scaling: RopeScaling | Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim
        self.max_seqlen = max_seqlen
        self.base = base
        self.scaling = RopeScaling.of(scaling)
        self.interleaved = interleaved
        self.backend = backend
        cos, sin = self._table(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _table(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        return rope_table(self.rotary_dim, self.max_seqlen or 0, base=self.base, scaling=self.scaling, device=device)

    def reset_parameters(self) -> None:
        """Computes the table again, where it is now."""
        self.cos, self.sin = self._table(self.cos.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # Neither a conversion of dtype nor Module.to_empty may spoil the table: it is computed anew.
        cos = self.cos
        super()._apply(fn, recurse)
        if self.cos.dtype is not torch.float32 or cos.is_meta:
            self.reset_parameters()
        return self

    def forward(
        self, q: Tensor, k: Tensor, *, position_ids: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """q (batch, seqlen, nheads_q, head_dim) and k (batch, seqlen, nheads_kv, head_dim), turned.

        position_ids: (batch, seqlen); integers are rows of the table, floats are computed for the call. Without them
        the positions are start, start + 1, ...; ValueError when the table does not reach that far.
        """
        if position_ids is not None:
            if start != 0:
                raise ValueError(f"start counts only without position_ids, got start={start} and position_ids")
            return self._at_positions(q, k, position_ids)
        seqlen = q.shape[1] if q.dim() > 1 else 0
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        if self.max_seqlen is None:
            positions = torch.arange(start, start + seqlen, device=q.device)
            cos, sin = self._computed(positions)
        elif start + seqlen > self.max_seqlen:
            raise ValueError(
                f"positions {start} to {start + seqlen - 1} are past the table's max_seqlen {self.max_seqlen}"
            )
        else:
            cos, sin = self.cos[start : start + seqlen], self.sin[start : start + seqlen]
        return rope(q, k, cos, sin, interleaved=self.interleaved, backend=self.backend)

    def _at_positions(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"interleaved": self.interleaved, "backend": self.backend}
        if self.max_seqlen is None or position_ids.dtype.is_floating_point:
            return rope(q, k, *self._computed(position_ids), **options)
        return rope(q, k, self.cos, self.sin, position_ids=position_ids, **options)

    def _computed(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(self.rotary_dim, position_ids=positions, base=self.base, scaling=self.scaling)

    def extra_repr(self) -> str:
        return (
            f"{self.rotary_dim}, max_seqlen={self.max_seqlen}, base={self.base}, scaling={self.scaling}, "
            f"interleaved={self.interleaved}, backend={self.backend!r}"
        )


class RepeatKV(torch.nn.Module):
    """`onepass.repeat_kv` with n_rep fixed; `onepass.attention` itself needs no repeated heads."""

    def __init__(self, n_rep: int, *, backend: str | None = None) -> None:
        super().__init__()
        if n_rep < 1:
            raise ValueError(f"n_rep must be at least 1, got {n_rep}")
        self.n_rep = n_rep
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, nheads_kv, head_dim) to (batch, seqlen, nheads_kv * n_rep, head_dim)."""
        return repeat_kv(x, self.n_rep, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.n_rep}, backend={self.backend!r}"
