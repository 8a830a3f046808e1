"""The kernels of cross-entropy: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core.registry import SupportTable
from onepass.core.row_kernels import RowKernels, by_dtype
from onepass.ops.cross_entropy.spec import CrossEntropySpec

_ROWS = RowKernels("onepass.ops.cross_entropy", CrossEntropySpec, lambda spec: {"logits'": spec.dtype})

FORWARD = _ROWS.table(
    "cross_entropy forward", cpu="cpu:forward", triton="triton.fwd:forward", reference="reference:forward"
)
BACKWARD = _ROWS.table(
    "cross_entropy backward", cpu="cpu:backward", triton="triton.bwd:backward", reference="reference:backward"
)
# The rows' losses to one number: on the CPU plain PyTorch does it as well as any kernel.
REDUCE = _ROWS.table(
    "cross_entropy reduction", cpu="reference:reduce", triton="triton.reduce:reduce", reference="reference:reduce"
)
# Between strips of linear_cross_entropy.
CARRY = _ROWS.table(
    "linear_cross_entropy carry", cpu="carry:carry", triton="triton.carry:carry", reference="carry:carry"
)
# linear_cross_entropy's gradients times that of its result, in place.
SCALE = _ROWS.table(
    "linear_cross_entropy scaling", cpu="reference:scale", triton="triton.scale:scale", reference="reference:scale"
)


def _features() -> dict[str, CrossEntropySpec]:
    """One spec for each thing a reader of the support table asks about."""
    return by_dtype(CrossEntropySpec("cpu", torch.float32))


SUPPORT = [
    SupportTable("cross_entropy, linear_cross_entropy", FORWARD, _features),
    SupportTable("cross_entropy, linear_cross_entropy, backward", BACKWARD, _features),
]
