"""The kernels of softmax: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.softmax.spec import SoftmaxSpec

_OPS = "onepass.ops.softmax"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtype_unsupported(spec: SoftmaxSpec, *more: torch.dtype) -> list[str]:
    if spec.dtype in (*_DTYPES, *more):
        return []
    return [f"x's dtype {str(spec.dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"]


def _cpu_unsupported(spec: SoftmaxSpec) -> list[str]:
    return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + _dtype_unsupported(spec)


def _triton_unsupported(spec: SoftmaxSpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtype_unsupported(spec)


def _reference_unsupported(spec: SoftmaxSpec) -> list[str]:
    return _dtype_unsupported(spec, torch.float64)


def _reference_slow(spec: SoftmaxSpec) -> list[str]:
    return ["plain PyTorch: the definition, several passes over memory"]


def _table(op: str, function: str, module: str) -> KernelTable:
    return KernelTable(
        op,
        SoftmaxSpec,
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


FORWARD = _table("softmax forward", "forward", "fwd")
BACKWARD = _table("softmax backward", "backward", "bwd")


def _features() -> dict[str, SoftmaxSpec]:
    """One spec for each thing a reader of the support table asks about."""
    dtypes = (*_DTYPES, torch.float64)
    return {str(dtype).removeprefix("torch."): SoftmaxSpec("cpu", dtype) for dtype in dtypes}


SUPPORT = [
    SupportTable("softmax", FORWARD, _features),
    SupportTable("softmax, backward", BACKWARD, _features),
]
