"""The kernels of attention: who can do what, in which order they are tried, and the reasons of each refusal."""

import torch

from onepass.core import cpu_library, triton_backend
from onepass.core.registry import Kernel, KernelTable, SupportTable
from onepass.ops.attention.spec import QUANTIZED_DTYPES, AttentionSpec, MergeSpec

_CPU = "onepass.ops.attention.cpu"
_REFERENCE = "onepass.ops.attention.reference"
_TRITON = "onepass.ops.attention.triton"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def _dtype_unsupported(dtype: torch.dtype) -> list[str]:
    return [] if dtype in _DTYPES else [f"dtype {_name(dtype)}: float32, bfloat16 and float16 only"]


def _sizes_unsupported(spec: AttentionSpec) -> list[str]:
    return [
        f"{name} {size} is above {_MAX_HEAD_DIM}"
        for name, size in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v))
        if size > _MAX_HEAD_DIM
    ]


def _cpu_machine(arch: str, dtype: torch.dtype) -> list[str]:
    return ([] if arch == "cpu" else [f"tensors are on {arch}"]) + _dtype_unsupported(dtype)


def _cpu_unsupported(spec: AttentionSpec) -> list[str]:
    return _cpu_machine(spec.arch, spec.dtype) + _sizes_unsupported(spec)


def _cpu_merge_unsupported(spec: MergeSpec) -> list[str]:
    return _cpu_machine(spec.arch, spec.dtype)


def _triton_unsupported(spec: AttentionSpec) -> list[str]:
    reasons = triton_backend.unsupported_arch(spec.arch) + _dtype_unsupported(spec.dtype) + _sizes_unsupported(spec)
    return reasons + [
        reason for dtype in spec.cache_dtypes for reason in triton_backend.unsupported_storage(spec.arch, dtype)
    ]


def _triton_merge_unsupported(spec: MergeSpec) -> list[str]:
    return triton_backend.unsupported_arch(spec.arch) + _dtype_unsupported(spec.dtype)


def _reference_unsupported(spec: AttentionSpec | MergeSpec) -> list[str]:
    if spec.dtype in (torch.float64, *_DTYPES):
        return []
    return [f"dtype {_name(spec.dtype)}: float64, float32, bfloat16 and float16 only"]


def _reference_slow(spec: AttentionSpec | MergeSpec) -> list[str]:
    return ["plain PyTorch: the definition, holds every score in memory"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(op: str, function: str, triton: str) -> KernelTable:
    """`triton`: the module of its launcher."""
    merging = function.startswith("merge")
    return KernelTable(
        op,
        MergeSpec if merging else AttentionSpec,
        [
            Kernel(
                "cpu",
                10,
                _cpu_merge_unsupported if merging else _cpu_unsupported,
                f"{_CPU}:{function}",
                unavailable=cpu_library.unavailable,
            ),
            triton_backend.row(
                _triton_merge_unsupported if merging else _triton_unsupported, f"{_TRITON}.{triton}:{function}"
            ),
            Kernel(
                "reference", 0, _reference_unsupported, f"{_REFERENCE}:{function}", _reference_slow, by_name_only=True
            ),
        ],
    )


def _varlen_table(op: str, function: str) -> KernelTable:
    return KernelTable(
        op,
        AttentionSpec,
        [
            Kernel("cpu", 10, _cpu_unsupported, f"{_CPU}_varlen:{function}", unavailable=cpu_library.unavailable),
            triton_backend.row(_triton_unsupported, f"{_TRITON}.varlen:{function}"),
            Kernel(
                "reference",
                0,
                _reference_unsupported,
                f"{_REFERENCE}_varlen:{function}",
                _reference_slow,
                by_name_only=True,
            ),
        ],
    )


FORWARD = _table("attention forward", "forward", "fwd")
BACKWARD = _table("attention backward", "backward", "bwd")
VARLEN_FORWARD = _varlen_table("attention_varlen forward", "forward")
VARLEN_BACKWARD = _varlen_table("attention_varlen backward", "backward")
DECODE = _table("attention_decode", "decode", "decode")
MERGE = _table("merge_attention forward", "merge", "merge")
MERGE_BACKWARD = _table("merge_attention backward", "merge_backward", "merge")


def _attention_features() -> dict[str, AttentionSpec]:
    """One spec for each thing a reader of the support table asks about."""
    plain = AttentionSpec("cpu", torch.float32, 64, 64)
    return {
        "float32": plain,
        "bfloat16": plain._replace(dtype=torch.bfloat16),
        "float16": plain._replace(dtype=torch.float16),
        "float64": plain._replace(dtype=torch.float64),
        "head_dim up to 256": plain._replace(head_dim=256, head_dim_v=256),
        "head_dim above 256": plain._replace(head_dim=512, head_dim_v=512),
        "head_dim_v != head_dim": plain._replace(head_dim=192, head_dim_v=128),
        "grouped and multi-query heads": plain._replace(group=4),
        "causal, bottom_right": plain._replace(limited_right=True),
        "causal, top_left": plain._replace(limited_right=True, bottom_right=False),
        "window_size": plain._replace(limited_left=True, limited_right=True),
        "key_mask": plain._replace(key_mask=True),
        "softcap": plain._replace(softcap=True),
        "alibi_slopes": plain._replace(alibi=True),
        "attn_bias": plain._replace(bias=True),
        "attn_sink": plain._replace(sink=True),
        "dropout_p": plain._replace(dropout=True),
        "deterministic": plain._replace(deterministic=True),
    }


def _backward_features() -> dict[str, AttentionSpec]:
    return {
        name: spec._replace(need_dq=True, need_dkv=True, need_dbias=spec.bias, need_dsink=spec.sink)
        for name, spec in _attention_features().items()
    }


def _decode_features() -> dict[str, AttentionSpec]:
    features = _attention_features()
    left_out = ("key_mask", "attn_bias", "dropout_p", "deterministic", "causal, top_left")
    plain = features["float32"]
    kept = {name.replace(", bottom_right", ""): spec for name, spec in features.items() if name not in left_out}
    formats = {
        f"caches of {_name(dtype)}": plain._replace(quantized=True, cache_dtypes=(dtype, dtype))
        for dtype in QUANTIZED_DTYPES
    }
    return kept | {"page_table": plain._replace(paged=True)} | formats | {"caches of int4": plain._replace(int4=True)}


def _varlen_features() -> dict[str, AttentionSpec]:
    features = _attention_features()
    return features | {"page_table": features["float32"]._replace(paged=True)}


def _merge_features() -> dict[str, MergeSpec]:
    return {_name(dtype): MergeSpec("cpu", dtype, 64) for dtype in (*_DTYPES, torch.float64)}


# What `python -m onepass.core.support_table` writes into the README and docs/backends.md.
SUPPORT = [
    SupportTable("attention", FORWARD, _attention_features),
    SupportTable("attention, backward", BACKWARD, _backward_features),
    SupportTable("attention_varlen", VARLEN_FORWARD, _varlen_features),
    SupportTable("attention_varlen, backward", VARLEN_BACKWARD, _backward_features),
    SupportTable("attention_decode", DECODE, _decode_features),
    SupportTable("merge_attention", MERGE, _merge_features),
    SupportTable("merge_attention, backward", MERGE_BACKWARD, _merge_features),
]
