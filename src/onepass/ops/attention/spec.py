"""The facts a kernel is chosen by, and the checks that keep memory safe.

The checks run in the operations' bodies and in their fakes, so they hold for the public functions, for
`torch.ops.onepass.*` called directly, and while compiling. A valid call costs one comparison; messages are made on
failure.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass.core import checks, device

# Cache formats that are multiplied by k_descale and v_descale.
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

ROLES = {
    "q": "(batch, seqlen_q, nheads_q, head_dim)",
    "k": "(batch, seqlen_k, nheads_kv, head_dim)",
    "v": "(batch, seqlen_k, nheads_kv, head_dim_v)",
    "k_cache": "(batch, capacity, nheads_kv, head_dim), or (pages, page_size, nheads_kv, head_dim) with page_table",
    "v_cache": "(batch, capacity, nheads_kv, head_dim_v), or (pages, page_size, nheads_kv, head_dim_v) with page_table",
}


class AttentionSpec(NamedTuple):
    """Facts of one call of attention, its backward, or attention_decode."""

    arch: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    group: int = 1  # query heads per KV head
    limited_left: bool = False  # window_size limits the keys on the left; causal limits them on the right
    limited_right: bool = False
    bottom_right: bool = True
    softcap: bool = False
    alibi: bool = False
    bias: bool = False
    sink: bool = False
    key_mask: bool = False
    dropout: bool = False
    deterministic: bool = False
    tf32: bool = False
    paged: bool = False
    quantized: bool = False  # k_descale or v_descale given
    need_dq: bool = False
    need_dkv: bool = False
    need_dbias: bool = False
    need_dsink: bool = False
    cache_dtypes: tuple[torch.dtype, ...] = ()  # of quantised caches
    int4: bool = False  # k_scale_shift and v_scale_shift given


class MergeSpec(NamedTuple):
    """Facts of one call of merge_attention or its backward."""

    arch: str
    dtype: torch.dtype
    head_dim: int


# batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v
Sizes = tuple[int, int, int, int, int, int, int]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, except that fp64 inputs (the reference alone takes them) keep fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def attention_facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    key_mask: Tensor | None,
    rng_state: Tensor | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    need_dq: bool = False,
    need_dkv: bool = False,
    need_dbias: bool = False,
    need_dsink: bool = False,
) -> tuple[Any, ...]:
    """Checks a call of attention_fwd; the fields of its AttentionSpec, which is built when a choice is first made.

    Raises ValueError or TypeError naming the argument.
    """
    batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v = qkv_sizes(q, k, v)
    if attn_bias is not None or alibi_slopes is not None or attn_sink is not None or key_mask is not None:
        _check_options(q, (batch, nheads_q, seqlen_q, seqlen_k), attn_bias, alibi_slopes, attn_sink, key_mask)
    if dropout_p != 0.0:
        check_rng_state(q, rng_state)
    arch, tf32 = ("cpu", False) if q.is_cpu else (device.arch(q), device.allows_tf32(q))
    return (
        arch,
        q.dtype,
        head_dim,
        head_dim_v,
        nheads_q // nheads_kv,
        window_left >= 0,
        window_right >= 0,
        bottom_right,
        softcap != 0.0,
        alibi_slopes is not None,
        attn_bias is not None,
        attn_sink is not None,
        key_mask is not None,
        dropout_p != 0.0,
        deterministic,
        tf32,
        False,
        False,
        need_dq,
        need_dkv,
        need_dbias,
        need_dsink,
    )


def qkv_sizes(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """The sizes of q, k and v, which must agree."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) == len(k_shape) == len(v_shape) == 4:
        batch, seqlen_q, nheads_q, head_dim = q_shape
        batch_k, seqlen_k, nheads_kv, head_dim_k = k_shape
        batch_v, seqlen_v, nheads_v, head_dim_v = v_shape
        dtype = q.dtype
        if (
            batch == batch_k == batch_v
            and seqlen_k == seqlen_v
            and nheads_kv == nheads_v
            and head_dim == head_dim_k
            and nheads_q >= nheads_kv > 0
            and nheads_q % nheads_kv == 0
            and head_dim > 0
            and head_dim_v > 0
            and dtype is k.dtype
            and dtype is v.dtype
            and dtype.is_floating_point
            and ((q.is_cpu and k.is_cpu and v.is_cpu) or q.device == k.device == v.device)
        ):
            return batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v
    raise _qkv_error({"q": q, "k": k, "v": v}, paged=False)


def _qkv_error(tensors: dict[str, Tensor], paged: bool, quantized: bool = False, int4: bool = False) -> Exception:
    """Why q and a pair of k and v (or of caches) do not go together; the first of the contradictions, in words."""
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            return ValueError(f"{name} must be {ROLES[name]}, got {checks.shape(tensor)}")
    return _kind_error(tensors, quantized, int4) or _shape_error(tensors, paged, 2 if int4 else 1)


def _kind_error(tensors: dict[str, Tensor], quantized: bool, int4: bool) -> Exception | None:
    (_, q), *others = tensors.items()
    if not q.dtype.is_floating_point:
        return TypeError(f"q must be floating point, got {checks.describe(q)}")
    for name, tensor in others:
        if int4 and tensor.dtype is not torch.uint8:
            return TypeError(
                f"{name} must be uint8 with k_scale_shift and v_scale_shift, got {checks.describe(tensor)}"
            )
        if not int4 and tensor.dtype is not q.dtype and not (quantized and tensor.dtype in QUANTIZED_DTYPES):
            descale = "; a quantised cache needs k_descale and v_descale" if tensor.dtype in QUANTIZED_DTYPES else ""
            descale = (
                "; an int4 cache needs k_scale_shift and v_scale_shift" if tensor.dtype is torch.uint8 else descale
            )
            return TypeError(f"{name} must have q's dtype {q.dtype}, got {checks.describe(tensor)}{descale}")
        if tensor.device != q.device:
            return ValueError(f"{name} must be on q's device {q.device}, got {checks.describe(tensor)}")
    return None


def _shape_error(tensors: dict[str, Tensor], paged: bool, per_byte: int) -> Exception:
    (_, q), (k_name, k), (v_name, v) = tensors.items()
    batch, _, nheads_q, head_dim = q.shape
    for name, tensor in tensors.items():
        if tensor.shape[3] < 1:
            return ValueError(f"{name}'s head dimension (the last) must be at least 1, got {checks.shape(tensor)}")
    if per_byte == 2 and 2 * k.shape[3] != head_dim:
        return ValueError(f"{k_name} must have q's head_dim {head_dim}, two features in a byte, got {checks.shape(k)}")
    if per_byte == 1 and k.shape[3] != head_dim:
        return ValueError(f"{k_name} must have q's head_dim {head_dim} (the last dimension), got {checks.shape(k)}")
    if not paged and k.shape[0] != batch:
        return ValueError(f"{k_name} must have q's batch size {batch}, got {checks.shape(k)}")
    if v.shape[:3] != k.shape[:3]:
        expected = f"{k_name}'s sizes {checks.shape(k)} but for the last dimension"
        return ValueError(f"{v_name} must have {expected}, got {checks.shape(v)}")
    return ValueError(
        f"q's {nheads_q} heads must be a multiple of {k_name}'s {k.shape[2]}, and both at least 1: q is "
        f"{checks.shape(q)}, {k_name} {checks.shape(k)} (layout: batch, seqlen, heads, head_dim; pass a "
        "(batch, heads, seqlen, head_dim) tensor as x.transpose(1, 2))"
    )


def _check_options(
    q: Tensor,
    full: tuple[int, int, int, int],
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    batch, nheads_q, _, seqlen_k = full
    if key_mask is not None:
        checks.require_dtype("key_mask", key_mask, (torch.bool,))
        checks.require_shape("key_mask", key_mask, {"(batch, seqlen_k)": (batch, seqlen_k)})
        checks.require_device("key_mask", key_mask, q.device)
    if attn_bias is not None:
        checks.require_dtype("attn_bias", attn_bias, (q.dtype, torch.float32))
        if attn_bias.dim() != 4 or any(
            size not in (1, wanted) for size, wanted in zip(attn_bias.shape, full, strict=True)
        ):
            raise ValueError(
                f"attn_bias must be broadcastable to (batch, nheads_q, seqlen_q, seqlen_k) = {full}, "
                f"got {checks.shape(attn_bias)}"
            )
        checks.require_device("attn_bias", attn_bias, q.device)
    if alibi_slopes is not None:
        check_alibi(q, batch, nheads_q, alibi_slopes)
    if attn_sink is not None:
        check_sink(q, nheads_q, attn_sink)


def check_alibi(q: Tensor, batch: int, nheads_q: int, alibi_slopes: Tensor) -> None:
    checks.require_dtype("alibi_slopes", alibi_slopes, (torch.float32,))
    allowed: dict[str, tuple[int, ...]] = {"(nheads_q,)": (nheads_q,), "(batch, nheads_q)": (batch, nheads_q)}
    checks.require_shape("alibi_slopes", alibi_slopes, allowed)
    checks.require_device("alibi_slopes", alibi_slopes, q.device)


def check_sink(q: Tensor, nheads_q: int, attn_sink: Tensor) -> None:
    checks.require_dtype("attn_sink", attn_sink, (q.dtype, torch.float32))
    checks.require_shape("attn_sink", attn_sink, {"(nheads_q,)": (nheads_q,)})
    checks.require_device("attn_sink", attn_sink, q.device)


def check_rng_state(q: Tensor, rng_state: Tensor | None) -> None:
    if rng_state is None:
        raise ValueError("rng_state is needed when dropout_p > 0: int64 (2,) = (seed, offset)")
    checks.require_dtype("rng_state", rng_state, (torch.int64,))
    checks.require_shape("rng_state", rng_state, {"(2,)": (2,)})
    checks.require_device("rng_state", rng_state, q.device)


def check_backward(do: Tensor, dlse: Tensor | None, q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """What attention_bwd takes beyond the forward's arguments must fit them."""
    batch, seqlen_q, nheads_q, _ = q.shape
    out_shape = (batch, seqlen_q, nheads_q, v.shape[3])
    lse_shape = (batch, nheads_q, seqlen_q)
    wanted: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("do", do, out_shape, q.dtype),
        ("out", out, out_shape, q.dtype),
        ("lse", lse, lse_shape, lse_dtype(q.dtype)),
    ]
    if dlse is not None:
        wanted.append(("dlse", dlse, lse_shape, lse_dtype(q.dtype)))
    for name, tensor, sizes, dtype in wanted:
        if tensor.shape != sizes or tensor.dtype is not dtype or tensor.device != q.device:
            raise ValueError(f"{name} must be {dtype} {tuple(sizes)} on {q.device}, got {checks.describe(tensor)}")


def decode_facts(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    k_scale_shift: Tensor | None,
    v_scale_shift: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Any, ...]:
    """Checks a call of attention_decode; the fields of its AttentionSpec.

    Raises ValueError or TypeError naming the argument.
    """
    quantized = k_descale is not None or v_descale is not None
    int4 = k_scale_shift is not None or v_scale_shift is not None
    if int4 and quantized:
        raise ValueError("give k_descale and v_descale (int8, fp8) or k_scale_shift and v_scale_shift (int4), not both")
    batch, _, _, nheads_q, nheads_kv, head_dim, head_dim_v = decode_sizes(
        q, k_cache, v_cache, cache_seqlens, page_table, quantized, int4
    )
    if int4:
        _check_pairs("k_scale_shift", k_scale_shift, "k_cache", k_cache)
        _check_pairs("v_scale_shift", v_scale_shift, "v_cache", v_cache)
    if alibi_slopes is not None:
        check_alibi(q, batch, nheads_q, alibi_slopes)
    if attn_sink is not None:
        check_sink(q, nheads_q, attn_sink)
    for name, descale in (("k_descale", k_descale), ("v_descale", v_descale)):
        if descale is not None:
            allowed = {"(nheads_kv,)": (nheads_kv,), "(batch, nheads_kv)": (batch, nheads_kv)}
            checks.require_dtype(name, descale, (torch.float32,))
            checks.require_shape(name, descale, allowed)
            checks.require_device(name, descale, q.device)
    arch, tf32 = ("cpu", False) if q.is_cpu else (device.arch(q), device.allows_tf32(q))
    return (
        arch,
        q.dtype,
        head_dim,
        head_dim_v,
        nheads_q // nheads_kv,
        window_left >= 0,
        window_right >= 0,
        True,
        softcap != 0.0,
        alibi_slopes is not None,
        False,
        attn_sink is not None,
        False,
        False,
        False,
        tf32,
        page_table is not None,
        quantized,
        False,
        False,
        False,
        False,
        tuple([cache.dtype for cache in (k_cache, v_cache) if cache.dtype is not q.dtype]) if quantized else (),
        int4,
    )


def _check_pairs(name: str, pairs: Tensor | None, cache_name: str, cache: Tensor) -> None:
    """The scales and shifts of an int4 cache."""
    if pairs is None:
        raise ValueError(f"{name} is needed with the other one: fp16 {cache_name}'s first three sizes and (groups, 2)")
    checks.require_dtype(name, pairs, (torch.float16,))
    groups = pairs.shape[3] if pairs.dim() == 5 else 0
    if pairs.shape != (*cache.shape[:3], groups, 2) or groups < 1 or cache.shape[3] % groups:
        raise ValueError(
            f"{name} must be {cache_name}'s first three sizes and (groups, 2), groups dividing its {cache.shape[3]} "
            f"bytes: {checks.shape(pairs)} came for {checks.shape(cache)}"
        )
    checks.require_device(name, pairs, cache.device)


def decode_sizes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    page_table: Tensor | None,
    quantized: bool,
    int4: bool = False,
) -> Sizes:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if page_table is None and not quantized and not int4:
        try:
            sizes = qkv_sizes(q, k_cache, v_cache)
        except (ValueError, TypeError):
            raise _qkv_error(tensors, paged=False) from None
    else:
        sizes = _special_cache_sizes(tensors, page_table, quantized, int4)
    if cache_seqlens is not None:
        same_device = (cache_seqlens.is_cpu and q.is_cpu) or cache_seqlens.device == q.device
        if cache_seqlens.dtype is not torch.int32 or cache_seqlens.shape != (sizes[0],) or not same_device:
            checks.require_dtype("cache_seqlens", cache_seqlens, (torch.int32,))
            checks.require_shape("cache_seqlens", cache_seqlens, {"(batch,)": (sizes[0],)})
            checks.require_device("cache_seqlens", cache_seqlens, q.device)
    elif page_table is not None:
        raise ValueError("cache_seqlens is needed with page_table: int32 (batch,), the keys stored for each sequence")
    return sizes


def _special_cache_sizes(tensors: dict[str, Tensor], page_table: Tensor | None, quantized: bool, int4: bool) -> Sizes:
    """The sizes of a call on paged or quantised caches."""
    q, k_cache, v_cache = tensors.values()
    paged = page_table is not None
    good = q.dim() == k_cache.dim() == v_cache.dim() == 4 and q.dtype.is_floating_point
    dtypes = (torch.uint8,) if int4 else (q.dtype, *QUANTIZED_DTYPES) if quantized else (q.dtype,)
    per_byte = 2 if int4 else 1  # features in an element
    good = good and k_cache.dtype in dtypes and v_cache.dtype in dtypes
    good = good and q.device == k_cache.device == v_cache.device and v_cache.shape[:3] == k_cache.shape[:3]
    good = good and per_byte * k_cache.shape[3] == q.shape[3] and q.shape[3] > 0 and v_cache.shape[3] > 0
    good = good and (paged or k_cache.shape[0] == q.shape[0])
    good = good and 0 < k_cache.shape[2] <= q.shape[2] and q.shape[2] % k_cache.shape[2] == 0
    if not good:
        raise _qkv_error(tensors, paged, quantized, int4)
    batch, seqlen_q, nheads_q, head_dim = q.shape
    capacity = k_cache.shape[1]
    if page_table is not None:
        checks.require_dtype("page_table", page_table, (torch.int32,))
        if page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(
                f"page_table must be (batch, max_pages) with batch {batch}, got {checks.shape(page_table)}"
            )
        checks.require_device("page_table", page_table, q.device)
        capacity = page_table.shape[1] * k_cache.shape[1]
    return batch, seqlen_q, capacity, nheads_q, k_cache.shape[2], head_dim, per_byte * v_cache.shape[3]


def check_cache_contents(k_cache: Tensor, cache_seqlens: Tensor | None, page_table: Tensor | None) -> None:
    """Lengths and pages must lie inside the cache. Reads them where that waits for nothing, on the CPU."""
    if cache_seqlens is None or not cache_seqlens.is_cpu:
        return
    lengths = cache_seqlens.tolist()
    pages, page_size = k_cache.shape[:2]
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    for index, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(f"cache_seqlens[{index}] is {length}, but the cache holds 0 to {capacity} keys")
    if page_table is None:
        return
    for index, (length, row) in enumerate(zip(lengths, page_table.tolist(), strict=True)):
        for position, page in enumerate(row[: -(-length // max(page_size, 1))]):
            if not 0 <= page < pages:
                raise ValueError(f"page_table[{index}, {position}] is {page}, but the cache has {pages} pages")


def merge_facts(outs: Tensor, lses: Tensor) -> tuple[Any, ...]:
    """Checks a call of merge_attention; the fields of its MergeSpec."""
    shape = outs.shape
    if len(shape) not in (4, 5):
        raise ValueError(
            "outs must be stacked results (n, batch, seqlen_q, nheads_q, head_dim_v) or "
            f"(n, total_q, nheads_q, head_dim_v), got {checks.shape(outs)}"
        )
    if not outs.dtype.is_floating_point:
        raise TypeError(f"outs must be floating point, got {checks.describe(outs)}")
    if shape[0] < 1 or shape[-1] < 1:
        raise ValueError(f"outs must hold at least one part with head_dim_v of at least 1, got {checks.shape(outs)}")
    checks.require_dtype("lses", lses, (lse_dtype(outs.dtype),))
    checks.require_device("lses", lses, outs.device)
    spelled = "(n, batch, nheads_q, seqlen_q)" if len(shape) == 5 else "(n, nheads_q, total_q)"
    checks.require_shape("lses", lses, {spelled: (*shape[:-3], shape[-2], shape[-3])})
    return device.arch(outs), outs.dtype, shape[-1]


def check_merge_backward(do: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """What merge_attention_bwd takes beyond the forward's arguments must fit them."""
    wanted = [("do", do, outs), ("out", out, outs), ("lse", lse, lses)]
    if dlse is not None:
        wanted.append(("dlse", dlse, lses))
    for name, tensor, stacked in wanted:
        if tensor.shape != stacked.shape[1:] or tensor.dtype is not stacked.dtype or tensor.device != stacked.device:
            expected = f"{stacked.dtype} {tuple(stacked.shape[1:])} on {stacked.device}"
            raise ValueError(f"{name} must be {expected}, got {checks.describe(tensor)}")
