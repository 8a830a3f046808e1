"""The kernels of repeat_kv: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core.registry import SupportTable
from onepass.core.row_kernels import RowKernels, by_dtype
from onepass.ops.repeat_kv.spec import RepeatKvSpec

_ROWS = RowKernels(
    "onepass.ops.repeat_kv",
    RepeatKvSpec,
    lambda spec: {"x's": spec.dtype},
    slow="plain PyTorch: the definition, copies through the general path",
)

FORWARD = _ROWS.table(
    "repeat_kv forward", cpu="cpu:forward", triton="triton.repeat:forward", reference="reference:forward"
)
BACKWARD = _ROWS.table(
    "repeat_kv backward", cpu="cpu:backward", triton="triton.repeat:backward", reference="reference:backward"
)


def _features() -> dict[str, RepeatKvSpec]:
    """One spec for each thing a reader of the support table asks about."""
    return by_dtype(RepeatKvSpec("cpu", torch.float32))


SUPPORT = [
    SupportTable("repeat_kv", FORWARD, _features),
    SupportTable("repeat_kv, backward", BACKWARD, _features),
]
