"""The kernels of the norms: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.norm.spec import NormSpec

_OPS = "onepass.ops.norm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtypes_unsupported(spec: NormSpec, *more: torch.dtype) -> list[str]:
    found = {
        "x": spec.dtype,
        "weight": spec.weight_dtype,
        "bias": spec.bias_dtype,
        "residual": spec.residual_dtype,
    }
    return [
        f"{name}'s dtype {str(dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"
        for name, dtype in found.items()
        if dtype is not None and dtype not in (*_DTYPES, *more)
    ]


def _cpu_unsupported(spec: NormSpec) -> list[str]:
    return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + _dtypes_unsupported(spec)


def _triton_unsupported(spec: NormSpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtypes_unsupported(spec)


def _reference_unsupported(spec: NormSpec) -> list[str]:
    return _dtypes_unsupported(spec, torch.float64)


def _reference_slow(spec: NormSpec) -> list[str]:
    return ["plain PyTorch: the definition, several passes over memory"]


def _table(op: str, function: str, module: str) -> KernelTable:
    return KernelTable(
        op,
        NormSpec,
        [
            Kernel("cpu", 10, _cpu_unsupported, f"{_OPS}.cpu:{function}", unavailable=cpu_library.unavailable),
            triton_backend.row(
                _triton_unsupported,
                f"{_OPS}.triton.{module}:{function}",
                direct=f"{_OPS}.triton.{module}:direct_forward" if function == "forward" else None,
            ),
            Kernel(
                "reference",
                0,
                _reference_unsupported,
                f"{_OPS}.reference:{function}",
                _reference_slow,
                by_name_only=True,
            ),
        ],
    )


FORWARD = _table("norm forward", "forward", "fwd")
BACKWARD = _table("norm backward", "backward", "bwd")


def _features() -> dict[str, NormSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = NormSpec("cpu", torch.float32, False, torch.float32)
    return {
        "float32": plain,
        "bfloat16": plain._replace(dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
        "float16": plain._replace(dtype=torch.float16, weight_dtype=torch.float16),
        "float64": plain._replace(dtype=torch.float64, weight_dtype=torch.float64),
        "bfloat16 with a float32 weight": plain._replace(dtype=torch.bfloat16),
        "no weight": plain._replace(weight_dtype=None),
        "layer_norm with bias": plain._replace(center=True, bias_dtype=torch.float32),
        "residual": plain._replace(residual_dtype=torch.float32),
    }


SUPPORT = [
    SupportTable("rms_norm, layer_norm", FORWARD, _features),
    SupportTable("rms_norm, layer_norm, backward", BACKWARD, _features),
]
