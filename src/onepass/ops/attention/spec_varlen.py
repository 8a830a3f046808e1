"""attention_varlen's facts and checks; see spec.py."""

import itertools
from typing import Any

import torch
from torch import Tensor

from onepass.core import checks, device
from onepass.ops.attention.spec import check_alibi, check_rng_state, check_sink, lse_dtype

ROLES = {
    "q": "(total_q, nheads_q, head_dim)",
    "k": "(total_k, nheads_kv, head_dim)",
    "v": "(total_k, nheads_kv, head_dim_v)",
}
PAGED_ROLES = {
    "q": ROLES["q"],
    "k": "(pages, page_size, nheads_kv, head_dim) with page_table",
    "v": "(pages, page_size, nheads_kv, head_dim_v) with page_table",
}


def varlen_facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    attn_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    attn_sink: Tensor | None,
    key_mask: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """Checks a call of attention_varlen_fwd; the fields of its AttentionSpec.

    Raises ValueError or TypeError naming the argument.
    """
    _check_tensors(q, k, v, paged=page_table is not None)
    batch = _check_sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table)
    for name, size in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    nheads_q = q.shape[1]
    if attn_bias is not None:
        _check_bias(q, (batch, nheads_q, max_seqlen_q, max_seqlen_k), attn_bias)
    if alibi_slopes is not None:
        check_alibi(q, batch, nheads_q, alibi_slopes)
    if attn_sink is not None:
        check_sink(q, nheads_q, attn_sink)
    if key_mask is not None:
        _check_key_mask(q, k, key_mask, page_table)
    if dropout_p != 0.0:
        check_rng_state(q, rng_state)
    arch, tf32 = ("cpu", False) if q.is_cpu else (device.arch(q), device.allows_tf32(q))
    return (
        arch,
        q.dtype,
        q.shape[2],
        v.shape[-1],
        nheads_q // k.shape[-2],
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
        page_table is not None,
        False,
        need_dq,
        need_dkv,
        need_dbias,
        need_dsink,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, paged: bool) -> None:
    """Raises what q, k and v contradict each other in, the first of it."""
    roles, dims = (PAGED_ROLES, 4) if paged else (ROLES, 3)
    for name, tensor, dim in (("q", q, 3), ("k", k, dims), ("v", v, dims)):
        if tensor.dim() != dim:
            padded = "; padded tensors go to onepass.attention" if tensor.dim() == 4 and dim == 3 else ""
            raise ValueError(f"{name} must be {roles[name]}, got {checks.shape(tensor)}{padded}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q must be floating point, got {checks.describe(q)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {checks.describe(tensor)}")
        checks.require_device(name, tensor, q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-1] < 1:
            raise ValueError(f"{name}'s head dimension (the last) must be at least 1, got {checks.shape(tensor)}")
    if k.shape[-1] != q.shape[2]:
        raise ValueError(f"k must have q's head_dim {q.shape[2]} (the last dimension), got {checks.shape(k)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have k's sizes {checks.shape(k)} but for the last dimension, got {checks.shape(v)}")
    nheads_q, nheads_kv = q.shape[1], k.shape[-2]
    if not 0 < nheads_kv <= nheads_q or nheads_q % nheads_kv:
        raise ValueError(
            f"q's {nheads_q} heads must be a multiple of k's {nheads_kv}, and both at least 1: q is "
            f"{checks.shape(q)}, k {checks.shape(k)} (layout: {roles['q']}, {roles['k']})"
        )


def _check_sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
) -> int:
    """The number of sequences, on which all that names them must agree."""
    _require_int32("cu_seqlens_q", cu_seqlens_q, q)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"cu_seqlens_q must be (batch + 1,), got {checks.shape(cu_seqlens_q)}")
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k is not None:
        _require_int32("cu_seqlens_k", cu_seqlens_k, q)
        checks.require_shape("cu_seqlens_k", cu_seqlens_k, {"(batch + 1,)": (batch + 1,)})
    elif page_table is None:
        raise ValueError(
            "cu_seqlens_k is needed without page_table: int32 (batch + 1,), where each sequence's keys lie"
        )
    if seqused_k is not None:
        _require_int32("seqused_k", seqused_k, q)
        checks.require_shape("seqused_k", seqused_k, {"(batch,)": (batch,)})
    elif cu_seqlens_k is None:
        raise ValueError("seqused_k or cu_seqlens_k is needed with page_table: int32, the keys of each sequence")
    if page_table is not None:
        _require_int32("page_table", page_table, q)
        if page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(
                f"page_table must be (batch, max_pages) with batch {batch}, got {checks.shape(page_table)}"
            )
    return batch


def _require_int32(name: str, tensor: Tensor, q: Tensor) -> None:
    checks.require_dtype(name, tensor, (torch.int32,))
    checks.require_device(name, tensor, q.device)


def _check_bias(q: Tensor, full: tuple[int, int, int, int], attn_bias: Tensor) -> None:
    checks.require_dtype("attn_bias", attn_bias, (q.dtype, torch.float32))
    if attn_bias.dim() != 4 or any(size not in (1, wanted) for size, wanted in zip(attn_bias.shape, full, strict=True)):
        raise ValueError(
            f"attn_bias must be broadcastable to (batch, nheads_q, max_seqlen_q, max_seqlen_k) = {full}, "
            f"got {checks.shape(attn_bias)}"
        )
    checks.require_device("attn_bias", attn_bias, q.device)


def _check_key_mask(q: Tensor, k: Tensor, key_mask: Tensor, page_table: Tensor | None) -> None:
    if page_table is not None:
        raise ValueError("key_mask is (total_k,) of packed keys, which page_table does not have; use seqused_k")
    checks.require_dtype("key_mask", key_mask, (torch.bool,))
    checks.require_shape("key_mask", key_mask, {"(total_k,)": (k.shape[0],)})
    checks.require_device("key_mask", key_mask, q.device)


def check_varlen_backward(do: Tensor, dlse: Tensor | None, q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """What attention_varlen_bwd takes beyond the forward's arguments must fit them."""
    total_q, nheads_q, _ = q.shape
    out_shape, lse_shape = (total_q, nheads_q, v.shape[2]), (nheads_q, total_q)
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


def check_varlen_contents(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Lengths must rise, end at the tensors' ends and fit max_seqlen, pages must exist: where that can be read without
    waiting for a device, on the CPU.
    """
    if not cu_seqlens_q.is_cpu:
        return
    lengths_q = _lengths("cu_seqlens_q", cu_seqlens_q, f"q's {q.shape[0]} tokens", q.shape[0])
    _check_longest("max_seqlen_q", max_seqlen_q, lengths_q, "cu_seqlens_q")
    lengths_k, named = None, "cu_seqlens_k"
    if cu_seqlens_k is not None:
        total = None if page_table is not None else k.shape[0]
        lengths_k = _lengths("cu_seqlens_k", cu_seqlens_k, f"k's {total} tokens", total)
    if seqused_k is not None:
        used, named = seqused_k.tolist(), "seqused_k"
        for index, length in enumerate(used):
            if length < 0 or (page_table is None and lengths_k is not None and length > lengths_k[index]):
                most = f"0 to {lengths_k[index]} keys of its sequence" if lengths_k is not None else "0 keys or more"
                raise ValueError(f"seqused_k[{index}] is {length}, expected {most}")
        lengths_k = used
    assert lengths_k is not None
    _check_longest("max_seqlen_k", max_seqlen_k, lengths_k, named)
    if page_table is not None:
        _check_pages(k, page_table, lengths_k, named)


def _lengths(name: str, cu_seqlens: Tensor, end: str, total: int | None) -> list[int]:
    places = cu_seqlens.tolist()
    if places[0] != 0:
        raise ValueError(f"{name} must start at 0, got {name}[0] = {places[0]}")
    lengths = [after - before for before, after in itertools.pairwise(places)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name} must not decrease, got {name}[{index}] = {places[index]} before {places[index + 1]}"
            )
    if total is not None and places[-1] != total:
        raise ValueError(f"{name} must end at {end}, got {name}[{len(lengths)}] = {places[-1]}")
    return lengths


def _check_longest(name: str, largest: int, lengths: list[int], where: str) -> None:
    longest = max(lengths, default=0)
    if largest < longest:
        raise ValueError(f"{name} is {largest}, but sequence {lengths.index(longest)} has {longest} by {where}")


def _check_pages(k: Tensor, page_table: Tensor, lengths: list[int], named: str) -> None:
    pages, page_size = k.shape[:2]
    capacity = page_table.shape[1] * page_size
    for index, (length, row) in enumerate(zip(lengths, page_table.tolist(), strict=True)):
        if length > capacity:
            raise ValueError(f"{named} gives sequence {index} {length} keys, but page_table holds {capacity} at most")
        for position, page in enumerate(row[: -(-length // page_size) if page_size else 0]):
            if not 0 <= page < pages:
                raise ValueError(f"page_table[{index}, {position}] is {page}, but there are {pages} pages")
