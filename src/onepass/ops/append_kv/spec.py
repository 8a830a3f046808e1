"""append_kv's facts and checks; they run in the operation's body and in its fake."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device

QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class AppendSpec(NamedTuple):
    """Facts of one call."""

    arch: str
    dtype: torch.dtype
    cache_dtypes: tuple[torch.dtype, torch.dtype]
    paged: bool = False
    int4: bool = False


def append_facts(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    k_scale_shift: Tensor | None,
    v_scale_shift: Tensor | None,
) -> tuple[Any, ...]:
    """Checks a call; the fields of its AppendSpec. Raises ValueError or TypeError naming the argument."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, seqlen_new, nheads_kv, head_dim), got {checks.shape(x)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {checks.describe(x)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's sizes {checks.shape(k)} but for the last dimension, got {checks.shape(v)}")
    checks.require_dtype("v", v, (k.dtype,))
    _check_places(k.shape[0], cache_seqlens, page_table)
    int4 = k_scale_shift is not None or v_scale_shift is not None
    if int4 and (k_scale_shift is None or v_scale_shift is None):
        raise ValueError("give both k_scale_shift and v_scale_shift, or neither")
    if int4 and (k_descale is not None or v_descale is not None):
        raise ValueError("give k_descale and v_descale (int8, fp8) or k_scale_shift and v_scale_shift (int4), not both")
    for name, x, cache, descale, pairs in (
        ("k", k, k_cache, k_descale, k_scale_shift),
        ("v", v, v_cache, v_descale, v_scale_shift),
    ):
        _check_cache(name, x, cache, descale, pairs, paged=page_table is not None)
    if v_cache.shape[:2] != k_cache.shape[:2]:
        raise ValueError(
            f"v_cache must have k_cache's first sizes {checks.shape(k_cache)}, got {checks.shape(v_cache)}"
        )
    others = {
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": cache_seqlens,
        "page_table": page_table,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "k_scale_shift": k_scale_shift,
        "v_scale_shift": v_scale_shift,
    }
    for name, other in others.items():
        if other is not None and other.device != k.device:
            raise ValueError(f"{name} must be on k's device {k.device}, got {checks.describe(other)}")
    return device.arch(k), k.dtype, (k_cache.dtype, v_cache.dtype), page_table is not None, int4


def _check_places(batch: int, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    checks.require_dtype("cache_seqlens", cache_seqlens, (torch.int32,))
    checks.require_shape("cache_seqlens", cache_seqlens, {"(batch,)": (batch,)})
    if page_table is not None:
        checks.require_dtype("page_table", page_table, (torch.int32,))
        if page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(
                f"page_table must be (batch, max_pages) with batch {batch}, got {checks.shape(page_table)}"
            )


def _check_cache(
    name: str, x: Tensor, cache: Tensor, descale: Tensor | None, pairs: Tensor | None, paged: bool
) -> None:
    batch, _, nheads_kv, head_dim = x.shape
    role = "(pages, page_size, nheads_kv, head_dim)" if paged else "(batch, capacity, nheads_kv, head_dim)"
    features = head_dim if pairs is None else head_dim // 2
    if pairs is not None:
        role = role.replace("head_dim", "head_dim / 2")
        if head_dim % 2:
            raise ValueError(f"{name}'s head_dim must be even for an int4 cache, got {checks.shape(x)}")
        checks.require_dtype(f"{name}_cache", cache, (torch.uint8,))
        checks.require_dtype(f"{name}_scale_shift", pairs, (torch.float16,))
        groups = pairs.shape[3] if pairs.dim() == 5 else 0
        wanted = (*cache.shape[:3], groups, 2)
        if pairs.dim() != 5 or pairs.shape != wanted or groups < 1 or features % groups:
            raise ValueError(
                f"{name}_scale_shift must be {name}_cache's first three sizes and (groups, 2), groups dividing "
                f"head_dim / 2 = {features}: {checks.shape(pairs)} came for {checks.shape(cache)}"
            )
    elif cache.dtype in QUANTIZED_DTYPES:
        if descale is None:
            raise ValueError(f"{name}_descale is needed for {name}_cache of {checks.describe(cache)}")
    elif cache.dtype is not x.dtype:
        hint = f"; int4 needs {name}_scale_shift" if cache.dtype is torch.uint8 else ""
        raise TypeError(f"{name}_cache must have {name}'s dtype {x.dtype}, got {checks.describe(cache)}{hint}")
    elif descale is not None:
        raise ValueError(f"{name}_descale is of int8 and fp8 caches, {name}_cache is {checks.describe(cache)}")
    if descale is not None:
        checks.require_dtype(f"{name}_descale", descale, (torch.float32,))
        allowed = {"(nheads_kv,)": (nheads_kv,), "(batch, nheads_kv)": (batch, nheads_kv)}
        checks.require_shape(f"{name}_descale", descale, allowed)
    if cache.dim() != 4 or tuple(cache.shape[2:]) != (nheads_kv, features) or (not paged and cache.shape[0] != batch):
        raise ValueError(f"{name}_cache must be {role} for {name} {checks.shape(x)}, got {checks.shape(cache)}")


def check_append_contents(k: Tensor, k_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    """There must be room, and pages for it. Reads lengths and pages where that waits for nothing, on the CPU."""
    if not cache_seqlens.is_cpu or not k.shape[1]:
        return
    pages, page_size = k_cache.shape[:2]
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    rows = None if page_table is None else page_table.tolist()
    for index, length in enumerate(cache_seqlens.tolist()):
        end = length + k.shape[1]
        if length < 0 or end > capacity:
            raise ValueError(
                f"cache_seqlens[{index}] is {length}: no room for {k.shape[1]} more keys, the cache holds {capacity}"
            )
        if rows is not None:
            for position in range(length // page_size, -(-end // page_size)):
                if not 0 <= rows[index][position] < pages:
                    page = rows[index][position]
                    raise ValueError(f"page_table[{index}, {position}] is {page}, but there are {pages} pages")
