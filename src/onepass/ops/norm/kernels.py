"""The kernels of the norms: who can do what, in which order they are tried, and the reasons of each refusal."""

from collections.abc import Mapping

import torch

from onepass.core.registry import SupportTable
from onepass.core.row_kernels import RowKernels, by_dtype
from onepass.ops.norm.spec import NormSpec


def _dtypes(spec: NormSpec) -> Mapping[str, torch.dtype | None]:
    return {
        "x's": spec.dtype,
        "weight's": spec.weight_dtype,
        "bias's": spec.bias_dtype,
        "residual's": spec.residual_dtype,
    }


_ROWS = RowKernels("onepass.ops.norm", NormSpec, _dtypes)

FORWARD = _ROWS.table(
    "norm forward",
    cpu="cpu:forward",
    triton="triton.fwd:forward",
    reference="reference:forward",
)
BACKWARD = _ROWS.table(
    "norm backward", cpu="cpu:backward", triton="triton.bwd:backward", reference="reference:backward"
)


def _features() -> dict[str, NormSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = NormSpec("cpu", torch.float32, False, torch.float32)
    return by_dtype(plain, "weight_dtype") | {
        "bfloat16 with a float32 weight": plain._replace(dtype=torch.bfloat16),
        "no weight": plain._replace(weight_dtype=None),
        "layer_norm with bias": plain._replace(center=True, bias_dtype=torch.float32),
        "residual": plain._replace(residual_dtype=torch.float32),
    }


SUPPORT = [
    SupportTable("rms_norm, layer_norm", FORWARD, _features),
    SupportTable("rms_norm, layer_norm, backward", BACKWARD, _features),
]
