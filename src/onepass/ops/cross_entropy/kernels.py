"""The kernels of cross-entropy: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.cross_entropy.spec import CrossEntropySpec

_OPS = "onepass.ops.cross_entropy"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtype_unsupported(spec: CrossEntropySpec, *more: torch.dtype) -> list[str]:
    if spec.dtype in (*_DTYPES, *more):
        return []
    return [f"logits' dtype {str(spec.dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"]


def _cpu_unsupported(spec: CrossEntropySpec) -> list[str]:
    return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + _dtype_unsupported(spec)


def _triton_unsupported(spec: CrossEntropySpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtype_unsupported(spec)


def _reference_unsupported(spec: CrossEntropySpec) -> list[str]:
    return _dtype_unsupported(spec, torch.float64)


def _reference_slow(spec: CrossEntropySpec) -> list[str]:
    return ["plain PyTorch: the definition, several passes over memory"]


def _table(op: str, cpu: str, triton: str, reference: str) -> KernelTable:
    return KernelTable(
        op,
        CrossEntropySpec,
        [
            Kernel("cpu", 10, _cpu_unsupported, f"{_OPS}.{cpu}", unavailable=cpu_library.unavailable),
            triton_backend.row(_triton_unsupported, f"{_OPS}.triton.{triton}"),
            Kernel("reference", 0, _reference_unsupported, f"{_OPS}.{reference}", _reference_slow, by_name_only=True),
        ],
    )


FORWARD = _table("cross_entropy forward", "cpu:forward", "fwd:forward", "reference:forward")
BACKWARD = _table("cross_entropy backward", "cpu:backward", "bwd:backward", "reference:backward")
# The rows' losses to one number: on the CPU plain PyTorch does it as well as any kernel.
REDUCE = _table("cross_entropy reduction", "reference:reduce", "reduce:reduce", "reference:reduce")
# Between strips of linear_cross_entropy.
CARRY = _table("linear_cross_entropy carry", "carry:carry", "carry:carry", "carry:carry")


def _features() -> dict[str, CrossEntropySpec]:
    """One spec for each thing a reader of the support table asks about."""
    dtypes = (*_DTYPES, torch.float64)
    return {str(dtype).removeprefix("torch."): CrossEntropySpec("cpu", dtype) for dtype in dtypes}


SUPPORT = [
    SupportTable("cross_entropy, linear_cross_entropy", FORWARD, _features),
    SupportTable("cross_entropy, linear_cross_entropy, backward", BACKWARD, _features),
]
