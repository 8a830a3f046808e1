"""The kernels of rope: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core.registry import SupportTable
from onepass.core.row_kernels import RowKernels, by_dtype
from onepass.ops.rope.spec import RopeSpec

_ROWS = RowKernels("onepass.ops.rope", RopeSpec, lambda spec: {"q's": spec.dtype})

FORWARD = _ROWS.table("rope", cpu="cpu:forward", triton="triton.fwd:forward", reference="reference:forward")


def _features() -> dict[str, RopeSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = RopeSpec("cpu", torch.float32, False, False, "shared")
    return by_dtype(plain) | {
        "interleaved pairs": plain._replace(interleaved=True),
        "rotary_dim below head_dim": plain._replace(partial=True),
        "cos and sin per batch": plain._replace(table="batched"),
        "position_ids": plain._replace(table="indexed"),
    }


SUPPORT = [SupportTable("rope, forward and backward", FORWARD, _features)]
