"""The kernels of swiglu and geglu: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.swiglu.spec import SwigluSpec

_OPS = "onepass.ops.swiglu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtypes_unsupported(spec: SwigluSpec, *more: torch.dtype) -> list[str]:
    if spec.dtype in (*_DTYPES, *more):
        return []
    return [f"gate's dtype {str(spec.dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"]


def _cpu_unsupported(spec: SwigluSpec) -> list[str]:
    return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + _dtypes_unsupported(spec)


def _triton_unsupported(spec: SwigluSpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtypes_unsupported(spec)


def _reference_unsupported(spec: SwigluSpec) -> list[str]:
    return _dtypes_unsupported(spec, torch.float64)


def _reference_slow(spec: SwigluSpec) -> list[str]:
    return ["plain PyTorch: the definition, several passes over memory"]


def _table(op: str, function: str, module: str) -> KernelTable:
    return KernelTable(
        op,
        SwigluSpec,
        [
            Kernel("cpu", 10, _cpu_unsupported, f"{_OPS}.cpu:{function}", unavailable=cpu_library.unavailable),
            triton_backend.row(_triton_unsupported, f"{_OPS}.triton.{module}:{function}"),
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


FORWARD = _table("swiglu forward", "forward", "fwd")
BACKWARD = _table("swiglu backward", "backward", "bwd")


def _features() -> dict[str, SwigluSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = SwigluSpec("cpu", torch.float32, "silu")
    return {
        "float32": plain,
        "bfloat16": plain._replace(dtype=torch.bfloat16),
        "float16": plain._replace(dtype=torch.float16),
        "float64": plain._replace(dtype=torch.float64),
        "geglu": plain._replace(activation="gelu"),
        "geglu, approximate='tanh'": plain._replace(activation="gelu_tanh"),
    }


SUPPORT = [
    SupportTable("swiglu, geglu", FORWARD, _features),
    SupportTable("swiglu, geglu, backward", BACKWARD, _features),
]
