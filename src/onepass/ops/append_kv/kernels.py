"""The kernels of append_kv: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.core.row_kernels import DTYPES, dtype_name
from onepass.ops.append_kv.spec import QUANTIZED_DTYPES, AppendSpec


def _dtype_unsupported(spec: AppendSpec) -> list[str]:
    name = dtype_name(spec.dtype)
    return [] if spec.dtype in DTYPES else [f"dtype {name}: float32, bfloat16 and float16 only"]


def _cpu_unsupported(spec: AppendSpec) -> list[str]:
    reasons = [] if spec.arch == "cpu" else [f"tensors are on {spec.arch}"]
    reasons += _dtype_unsupported(spec)
    fp8 = {dtype for dtype in spec.cache_dtypes if dtype in QUANTIZED_DTYPES and dtype is not torch.int8}
    return reasons + [f"no caches of {dtype_name(dtype)}" for dtype in sorted(fp8, key=str)]


def _triton_unsupported(spec: AppendSpec) -> list[str]:
    reasons = triton_backend.unsupported_arch(spec.arch) + _dtype_unsupported(spec)
    if spec.arch == "cpu" and any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in spec.cache_dtypes):
        reasons.append("Triton's interpreter rounds to fp8 wrongly")
    return reasons + [
        reason
        for dtype in dict.fromkeys(spec.cache_dtypes)
        for reason in triton_backend.unsupported_storage(spec.arch, dtype)
    ]


def _reference_unsupported(spec: AppendSpec) -> list[str]:
    return [] if spec.dtype is torch.float64 else _dtype_unsupported(spec)


APPEND = KernelTable(
    "append_kv",
    AppendSpec,
    [
        Kernel("cpu", 10, _cpu_unsupported, "onepass.ops.append_kv.cpu:append", unavailable=cpu_library.unavailable),
        triton_backend.row(_triton_unsupported, "onepass.ops.append_kv.triton.append:append"),
        Kernel(
            "reference",
            0,
            _reference_unsupported,
            "onepass.ops.append_kv.reference:append",
            lambda spec: ["plain PyTorch: the definition, through the general path of indexing"],
            by_name_only=True,
        ),
    ],
)
FORWARD = APPEND


def _features() -> dict[str, AppendSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = AppendSpec("cpu", torch.float32, (torch.float32, torch.float32))
    by_dtype = {
        dtype_name(dtype): plain._replace(dtype=dtype, cache_dtypes=(dtype, dtype))
        for dtype in (*DTYPES, torch.float64)
    }
    formats = {f"caches of {dtype_name(x)}": plain._replace(cache_dtypes=(x, x)) for x in QUANTIZED_DTYPES}
    int4 = plain._replace(cache_dtypes=(torch.uint8, torch.uint8), int4=True)
    return {**by_dtype, "page_table": plain._replace(paged=True), **formats, "caches of int4": int4}


SUPPORT = [SupportTable("append_kv", APPEND, _features)]
