"""The kernels of repeat_kv: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.repeat_kv.spec import RepeatKvSpec

_OPS = "onepass.ops.repeat_kv"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtypes_unsupported(spec: RepeatKvSpec, *more: torch.dtype) -> list[str]:
    if spec.dtype in (*_DTYPES, *more):
        return []
    return [f"x's dtype {str(spec.dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"]


def _cpu_unsupported(spec: RepeatKvSpec) -> list[str]:
    return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + _dtypes_unsupported(spec)


def _triton_unsupported(spec: RepeatKvSpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtypes_unsupported(spec)


def _reference_unsupported(spec: RepeatKvSpec) -> list[str]:
    return _dtypes_unsupported(spec, torch.float64)


def _reference_slow(spec: RepeatKvSpec) -> list[str]:
    return ["plain PyTorch: the definition, copies through the general path"]


def _table(op: str, function: str, module: str) -> KernelTable:
    return KernelTable(
        op,
        RepeatKvSpec,
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


FORWARD = _table("repeat_kv forward", "forward", "repeat")
BACKWARD = _table("repeat_kv backward", "backward", "repeat")


def _features() -> dict[str, RepeatKvSpec]:
    """One spec for each thing a reader of the support table asks about."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    return {name: RepeatKvSpec("cpu", dtype) for name, dtype in names.items()}


SUPPORT = [
    SupportTable("repeat_kv", FORWARD, _features),
    SupportTable("repeat_kv, backward", BACKWARD, _features),
]
