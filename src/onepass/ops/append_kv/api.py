"""append_kv: the public function, and the checks of its arguments' types."""

from typing import Any, NoReturn

from torch import Tensor

from onepass.core import checks
from onepass.core.registry import Choice, backend_in_use, choose, explains
from onepass.ops.append_kv import kernels, registration, spec

_HINTS = {
    "block_table": "use page_table=",
    "slot_mapping": "positions follow from cache_seqlens and page_table",
}


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scale_shift: Tensor | None = None,
    v_scale_shift: Tensor | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> None:
    """Writes new keys and values behind those that the caches hold, in place; quantised where the caches are.

    Args:
        k: (batch, seqlen_new, nheads_kv, head_dim), floating point, any strides.
        v: (batch, seqlen_new, nheads_kv, head_dim_v), k's dtype.
        k_cache: (batch, capacity, nheads_kv, head_dim), or (pages, page_size, nheads_kv, head_dim) with page_table; any
            strides. k's dtype, or int8 or fp8 with k_descale, or for int4 uint8 with half as many features.
        v_cache: the same with head_dim_v.
        cache_seqlens: int32 (batch,), the keys stored before the call: sequence b is written at positions
            cache_seqlens[b] to cache_seqlens[b] + seqlen_new - 1. It is not changed: `attention_decode`, which counts
            the new keys too, takes cache_seqlens + seqlen_new.
        page_table: int32 (batch, max_pages), the pages of each sequence in order.
        k_descale, v_descale: fp32 (nheads_kv,) or (batch, nheads_kv): x / descale is stored, rounded half to even in
            int8, cut to -127 and 127 (in fp8 to the largest number).
        k_scale_shift, v_scale_shift: fp16 (batch, capacity, nheads_kv, groups, 2), with pages (pages, page_size,
            nheads_kv, groups, 2): what `quantize_kv_int4` makes of the new rows is written there and to the caches.
        backend: a backend's name, which then never falls back; None chooses.

    Raises:
        ValueError: shapes or devices contradict; on the CPU also a position past the capacity or without a page, and
            then nothing is written. On a GPU, where looking would wait, such rows are not written.
        TypeError: a wrong dtype or type. onepass.UnsupportedError: no backend can do this call.
        NotImplementedError: an argument requires a gradient, outside of torch.no_grad().
    """
    if unknown:
        raise checks.unknown_argument(append_kv, next(iter(unknown)), _HINTS)
    call = _canonical(
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        page_table=page_table,
        k_descale=k_descale,
        v_descale=v_descale,
        k_scale_shift=k_scale_shift,
        v_scale_shift=v_scale_shift,
        backend=backend,
    )
    registration.append(*call)


def _canonical(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scale_shift: Tensor | None = None,
    v_scale_shift: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The arguments of the operation append_kv."""
    required: dict[str, Tensor | None] = {
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": cache_seqlens,
    }
    optional = {
        "page_table": page_table,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "k_scale_shift": k_scale_shift,
        "v_scale_shift": v_scale_shift,
    }
    for name, value in required.items():
        checks.require_tensor(name, value)
    checks.require_tensors(**optional)
    for name, value in {**required, **optional}.items():
        if value is not None:
            checks.require_strided(name, value)
    return *required.values(), *optional.values(), backend_in_use() if backend is None else backend


# What `explain` asks.


@explains("append_kv")
def _explain(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **options: Any
) -> list[Choice]:
    if unknown := options.keys() - checks.options_of(append_kv):
        raise checks.unknown_argument(append_kv, min(unknown), _HINTS)
    *arguments, backend = _canonical(k, v, k_cache, v_cache, cache_seqlens, **options)
    return [choose(kernels.APPEND, spec.append_facts(*arguments), backend)]
