"""The kernels of rope: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.rope.spec import RopeSpec

_OPS = "onepass.ops.rope"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtypes_unsupported(spec: RopeSpec, *more: torch.dtype) -> list[str]:
    if spec.dtype in (*_DTYPES, *more):
        return []
    return [f"q's dtype {str(spec.dtype).removeprefix('torch.')}: float32, bfloat16 and float16 only"]


def _cpu_unsupported(spec: RopeSpec) -> list[str]:
    return ([] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]) + _dtypes_unsupported(spec)


def _triton_unsupported(spec: RopeSpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtypes_unsupported(spec)


def _reference_unsupported(spec: RopeSpec) -> list[str]:
    return _dtypes_unsupported(spec, torch.float64)


def _reference_slow(spec: RopeSpec) -> list[str]:
    return ["plain PyTorch: the definition, several passes over memory"]


FORWARD = KernelTable(
    "rope",
    RopeSpec,
    [
        Kernel("cpu", 10, _cpu_unsupported, f"{_OPS}.cpu:forward", unavailable=cpu_library.unavailable),
        triton_backend.row(_triton_unsupported, f"{_OPS}.triton.fwd:forward"),
        Kernel(
            "reference",
            0,
            _reference_unsupported,
            f"{_OPS}.reference:forward",
            _reference_slow,
            by_name_only=True,
        ),
    ],
)


def _features() -> dict[str, RopeSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = RopeSpec("cpu", torch.float32, False, False, "shared")
    return {
        "float32": plain,
        "bfloat16": plain._replace(dtype=torch.bfloat16),
        "float16": plain._replace(dtype=torch.float16),
        "float64": plain._replace(dtype=torch.float64),
        "interleaved pairs": plain._replace(interleaved=True),
        "rotary_dim below head_dim": plain._replace(partial=True),
        "cos and sin per batch": plain._replace(table="batched"),
        "position_ids": plain._replace(table="indexed"),
    }


SUPPORT = [SupportTable("rope, forward and backward", FORWARD, _features)]
