"""The kernels of swiglu and geglu: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core.registry import SupportTable
from onepass.core.row_kernels import RowKernels, by_dtype
from onepass.ops.swiglu.spec import SwigluSpec

_ROWS = RowKernels("onepass.ops.swiglu", SwigluSpec, lambda spec: {"gate's": spec.dtype})

FORWARD = _ROWS.table("swiglu forward", cpu="cpu:forward", triton="triton.fwd:forward", reference="reference:forward")
BACKWARD = _ROWS.table(
    "swiglu backward", cpu="cpu:backward", triton="triton.bwd:backward", reference="reference:backward"
)


def _features() -> dict[str, SwigluSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = SwigluSpec("cpu", torch.float32, "silu")
    return by_dtype(plain) | {
        "geglu": plain._replace(activation="gelu"),
        "geglu, approximate='tanh'": plain._replace(activation="gelu_tanh"),
    }


SUPPORT = [
    SupportTable("swiglu, geglu", FORWARD, _features),
    SupportTable("swiglu, geglu, backward", BACKWARD, _features),
]
