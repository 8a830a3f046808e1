"""rope_table: the cosines and sines that rope turns by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from onepass.core import checks


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the context (Llama team 2024, "The Llama 3 Herd of Models").

    Wavelengths shorter than original_max_position_embeddings / high_freq_factor keep their frequency, those longer than
    original_max_position_embeddings / low_freq_factor turn `factor` times slower, those between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for field in fields(self):
            if checks.finite_float(f"scaling's {field.name}", getattr(self, field.name)) <= 0:
                raise ValueError(f"scaling's {field.name} must be above 0, got {getattr(self, field.name)}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"scaling's high_freq_factor must be above its low_freq_factor {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )

    @staticmethod
    def of(scaling: Any) -> "RopeScaling | None":
        """`scaling` as rope_table takes it: None, a RopeScaling, or the mapping of a model's config.json."""
        if scaling is None or isinstance(scaling, RopeScaling):
            return scaling
        if not isinstance(scaling, Mapping):
            raise TypeError(f"scaling must be a RopeScaling, a mapping or None, got {type(scaling).__name__}")
        options = dict(scaling)
        kinds = {options.pop(name) for name in ("rope_type", "type") if name in options}
        if kinds - {"llama3"}:
            raise ValueError(f"scaling's rope_type must be 'llama3', got {', '.join(map(repr, sorted(kinds)))}")
        known = [field.name for field in fields(RopeScaling)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"scaling has the unknown entries {', '.join(unknown)}: it takes {', '.join(known)}")
        return RopeScaling(**options)

    def scaled(self, frequencies: Tensor) -> Tensor:
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))  # over the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return frequencies * ((1.0 - kept) / self.factor + kept)


def rope_table(
    rotary_dim: int,
    max_seqlen: int | None = None,
    *,
    position_ids: Tensor | None = None,
    base: float = 10000.0,
    scaling: RopeScaling | Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2 i / rotary_dim), i < rotary_dim / 2 (Su et al. 2021, "RoFormer").

    Args:
        rotary_dim: how many features of a head are turned; even.
        max_seqlen: for the positions 0 to max_seqlen - 1; or
        position_ids: (seqlen,) or (batch, seqlen), integers or floats: for these positions.
        base: Llama 3's is 500000.
        scaling: Llama 3.1's rule: a `RopeScaling`, or a mapping with its fields; None: none.
        device: where the tables are; default: that of position_ids, else PyTorch's default device.

    Returns:
        cos, sin: fp32, (max_seqlen, rotary_dim / 2), or position_ids' shape and rotary_dim / 2, as `rope` takes them.
        Angles are fp64, so that far positions keep their phase.

    Raises:
        ValueError: an odd rotary_dim, neither or both of max_seqlen and position_ids, base or scaling out of range.
        TypeError: a wrong type.
    """
    if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int):
        raise TypeError(f"rotary_dim must be an int, got {rotary_dim!r}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2 (features are turned in pairs), got {rotary_dim}")
    if (max_seqlen is None) == (position_ids is None):
        raise ValueError(
            "rope_table takes either max_seqlen or position_ids: got " + ("neither", "both")[max_seqlen is not None]
        )
    base = checks.finite_float("base", base)
    if base <= 0:
        raise ValueError(f"base must be above 0, got {base}")
    scaling = RopeScaling.of(scaling)
    positions = _positions(max_seqlen, position_ids, device)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
    frequencies = torch.pow(base, -exponents)
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)
    angles = positions.unsqueeze(-1) * frequencies
    return angles.cos().float(), angles.sin().float()


def _positions(max_seqlen: int | None, position_ids: Tensor | None, device: torch.device | str | None) -> Tensor:
    if position_ids is None:
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
            raise TypeError(f"max_seqlen must be an int, got {max_seqlen!r}")
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")
        return torch.arange(max_seqlen, dtype=torch.float64, device=device)
    checks.require_tensor("position_ids", position_ids)
    if position_ids.dtype is torch.bool or position_ids.dtype.is_complex:
        raise TypeError(f"position_ids must be integers or floats, got {checks.describe(position_ids)}")
    if position_ids.dim() not in (1, 2):
        raise ValueError(f"position_ids must be (seqlen,) or (batch, seqlen), got {checks.shape(position_ids)}")
    return position_ids.detach().to(device or position_ids.device, torch.float64)
