"""The kernels of softmax: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core.registry import SupportTable
from onepass.core.row_kernels import RowKernels, by_dtype
from onepass.ops.softmax.spec import SoftmaxSpec

_ROWS = RowKernels("onepass.ops.softmax", SoftmaxSpec, lambda spec: {"x's": spec.dtype})

FORWARD = _ROWS.table("softmax forward", cpu="cpu:forward", triton="triton.fwd:forward", reference="reference:forward")
BACKWARD = _ROWS.table(
    "softmax backward", cpu="cpu:backward", triton="triton.bwd:backward", reference="reference:backward"
)


def _features() -> dict[str, SoftmaxSpec]:
    """One spec for each thing a reader of the support table asks about."""
    return by_dtype(SoftmaxSpec("cpu", torch.float32))


SUPPORT = [
    SupportTable("softmax", FORWARD, _features),
    SupportTable("softmax, backward", BACKWARD, _features),
]
