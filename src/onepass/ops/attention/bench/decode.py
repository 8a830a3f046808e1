"""Decode on GPUs: one query a sequence over a full cache, head_dim 128, in GB/s of the cache; the GPU's L2 is cold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import onepass
from onepass.bench import problems
from onepass.bench.problems import first_line
from onepass.bench.registry import Case, Group, Prepared
from onepass.core import kv_formats
from onepass.ops.attention.bench.contenders import (
    CUDNN,
    FLASH,
    FLASH_4,
    FLEX,
    compiled,
    first,
    flash_4_functions,
    refusal,
)
from onepass.testing import numerics

BF16 = torch.bfloat16
HEAD_DIM = 128
PAGE_SIZE = 16
FP8 = torch.float8_e4m3fn
FOLDED = "cudnn folded heads"
CONTIGUOUS = "onepass bf16"  # ours on a contiguous cache, which the other caches are compared with
CHECKED_UNITS = 8


@dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    heads_kv: int
    seqlen: int

    @property
    def name(self) -> str:
        return f"b{self.batch} {self.heads}/{self.heads_kv} kv{self.seqlen}"

    @property
    def rows(self) -> int:
        """Of keys; of values there are as many."""
        return self.batch * self.seqlen * self.heads_kv

    def cache_bytes(self, row_bytes: float) -> float:
        return 2.0 * self.rows * row_bytes


SIZES = (Size(64, 32, 8, 8192), Size(1, 32, 8, 131072), Size(16, 32, 8, 32768), Size(128, 32, 32, 2048))
FLEX_SIZES = SIZES[:1]  # each takes seconds to compile, and there is no bar against it


@dataclass(frozen=True)
class Cache:
    """k, v as stored, and what attention_decode needs to read them. `numbers` gives keys and values (1, seqlen, 1, d)
    of one sequence and KV head in fp64.
    """

    k: Tensor
    v: Tensor
    numbers: Callable[[int, int], tuple[Tensor, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)


def draw(size: Size, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, 1, heads, d); k, v (batch, seqlen, heads_kv, d)."""
    q = torch.randn(size.batch, 1, size.heads, HEAD_DIM, device=device, dtype=BF16)
    shape = (size.batch, size.seqlen, size.heads_kv, HEAD_DIM)
    k, v = (torch.randn(shape, device=device, dtype=BF16) for _ in range(2))
    return q, k, v


def unit(x: Tensor, sequence: int, head: int) -> Tensor:
    """Keys or values of one sequence and KV head."""
    return x[sequence : sequence + 1, :, head : head + 1].double()


def contiguous(k: Tensor, v: Tensor) -> Cache:
    return Cache(k, v, lambda sequence, head: (unit(k, sequence, head), unit(v, sequence, head)))


def paged(k: Tensor, v: Tensor) -> Cache:
    """The same numbers in pages in random order."""
    batch, seqlen, heads_kv, head_dim = k.shape
    order = torch.randperm(batch * seqlen // PAGE_SIZE, device=k.device)
    shape = (len(order), PAGE_SIZE, heads_kv, head_dim)
    pages = [torch.empty(shape, dtype=x.dtype, device=x.device).index_copy_(0, order, x.view(shape)) for x in (k, v)]
    table = order.to(torch.int32).view(batch, seqlen // PAGE_SIZE)
    return Cache(pages[0], pages[1], contiguous(k, v).numbers, {"page_table": table})


def fp8(k: Tensor, v: Tensor) -> Cache:
    """float8_e4m3fn with a scale for each KV head."""
    largest = torch.finfo(FP8).max
    scales = [x.abs().amax((0, 1, 3)).float() / largest for x in (k, v)]
    stored = [
        (x / scale[:, None].to(x.dtype)).clamp(-largest, largest).to(FP8)
        for x, scale in zip((k, v), scales, strict=True)
    ]

    def numbers(sequence: int, head: int) -> tuple[Tensor, Tensor]:
        parts = [unit(x, sequence, head) * scale[head].double() for x, scale in zip(stored, scales, strict=True)]
        return parts[0], parts[1]

    return Cache(stored[0], stored[1], numbers, {"k_descale": scales[0], "v_descale": scales[1]})


def int4(k: Tensor, v: Tensor) -> Cache:
    """Two features a byte, the even one in the low nibble; nibble * scale + shift, which are fp16 and of a row."""
    (stored_k, scales_k), (stored_v, scales_v) = onepass.quantize_kv_int4(k), onepass.quantize_kv_int4(v)

    def numbers(sequence: int, head: int) -> tuple[Tensor, Tensor]:
        kept = ((stored_k, scales_k), (stored_v, scales_v))
        one = slice(sequence, sequence + 1), slice(None), slice(head, head + 1)
        k_part, v_part = (kv_formats.dequantize_int4(x[one], pair[one], torch.float64) for x, pair in kept)
        return k_part, v_part

    return Cache(stored_k, stored_v, numbers, {"k_scale_shift": scales_k, "v_scale_shift": scales_v})


CACHES: dict[str, tuple[Callable[[Tensor, Tensor], Cache], float, float]] = {
    # -> how it is made, bytes of a row of HEAD_DIM features, the bar against ours in bf16
    "paged 16": (paged, 2.0 * HEAD_DIM, 0.95),
    "fp8": (fp8, 1.0 * HEAD_DIM, 1.7),
    "int4": (int4, 0.5 * HEAD_DIM + 4.0, 2.5),
}


def ours(q: Tensor, cache: Cache, lengths: Tensor, backend: str) -> Callable[[], Tensor]:
    decode = partial(onepass.attention_decode, backend=backend)
    return partial(decode, q, cache.k, cache.v, cache_seqlens=lengths, **cache.options)


# PyTorch's, on caches (batch, heads_kv, seqlen, d).


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of one KV head as rows, which PyTorch's users do for speed."""
    rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    return sdpa(SDPBackend.CUDNN_ATTENTION, rows, k, v).reshape(q.shape)


def flash_4(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return first(function(q, k, v))


def peers(size: Size, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """What makes each peer's call; the outputs are (batch, 1, heads, d) once reshaped."""
    own = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    found: dict[str, Callable[[], Callable[[], Tensor]]] = {
        CUDNN: lambda: partial(sdpa, SDPBackend.CUDNN_ATTENTION, *own),
        FLASH: lambda: partial(sdpa, SDPBackend.FLASH_ATTENTION, *own),
        FLASH_4: lambda: partial(flash_4, flash_4_functions()[0], q, k, v),
    }
    if size.heads != size.heads_kv:
        found[FOLDED] = lambda: partial(folded, *own)
    if size in FLEX_SIZES:
        found[FLEX] = lambda: partial(compiled(flex_attention), *own, enable_gqa=size.heads != size.heads_kv)
    return found


# Setting up and checking.


def errors_of(call: Callable[[], Tensor], q: Tensor, cache: Cache, size: Size) -> float:
    """The worst error of some heads' outputs, in budgets."""
    out = call().reshape(q.shape)
    group = size.heads // size.heads_kv
    count = min(CHECKED_UNITS, size.batch * size.heads_kv)
    worst = 0.0
    for chosen in torch.linspace(size.batch * size.heads_kv - 1, 0, count).long().tolist():
        sequence, head = divmod(chosen, size.heads_kv)
        heads = slice(head * group, (head + 1) * group)
        rows = q[sequence : sequence + 1, :, heads]
        k, v = cache.numbers(sequence, head)
        exact = onepass.attention(rows.double(), k, v, backend="reference")
        plain = onepass.attention(rows, k.to(q.dtype), v.to(q.dtype), backend="reference")
        worst = max(worst, numerics.error_in_budgets(out[sequence : sequence + 1, :, heads], exact, plain))
    return worst


def prepare(size: Size, device: str) -> Prepared:
    """Ours against PyTorch's, on a contiguous cache."""
    q, k, v = draw(size, device)
    lengths = torch.full((size.batch,), size.seqlen, dtype=torch.int32, device=device)
    cache = contiguous(k, v)
    us = problems.OURS[device]
    providers: dict[str, Callable[[], Tensor]] = {us: ours(q, cache, lengths, problems.BACKENDS[device])}
    absent: dict[str, str] = {}
    for name, make in peers(size, q, k, v).items():
        try:
            providers[name] = make()
        except Exception as error:
            absent[name] = first_line(error)

    def errors() -> dict[str, float]:
        found = {}
        for name, call in providers.items():
            try:
                found[name] = errors_of(call, q, cache, size)
            except Exception as error:
                if name == us:
                    raise
                absent[name] = first_line(error)
        return found

    return Prepared(providers, errors, absent=absent)


def prepare_cache(kind: str, size: Size, device: str) -> Prepared:
    """Ours on another kind of cache against ours on a contiguous one in bf16."""
    q, k, v = draw(size, device)
    lengths = torch.full((size.batch,), size.seqlen, dtype=torch.int32, device=device)
    caches = {problems.OURS[device]: CACHES[kind][0](k, v), CONTIGUOUS: contiguous(k, v)}
    providers = {name: ours(q, cache, lengths, problems.BACKENDS[device]) for name, cache in caches.items()}
    try:
        for call in providers.values():
            call()
    except onepass.UnsupportedError as error:
        raise refusal(error, problems.BACKENDS[device]) from error

    def errors() -> dict[str, float]:
        return {name: errors_of(call, q, caches[name], size) for name, call in providers.items()}

    return Prepared(providers, errors, own=frozenset({CONTIGUOUS}))


def params(size: Size, cache: str) -> dict[str, int | float | str | bool]:
    return {
        "batch": size.batch,
        "heads_q": size.heads,
        "heads_kv": size.heads_kv,
        "head_dim": HEAD_DIM,
        "seqlen_k": size.seqlen,
        "cache": cache,
    }


def decode_case(size: Size) -> Case:
    return Case(
        name=size.name,
        params=params(size, "bf16"),
        dtype="bfloat16",
        prepare=partial(prepare, size, "cuda"),
        min_bytes=size.cache_bytes(2.0 * HEAD_DIM),
        bars={f"ratio to {CUDNN}": 0.97},
        quick=size is SIZES[0],
    )


def cache_case(kind: str, size: Size) -> Case:
    _, row_bytes, bar = CACHES[kind]
    return Case(
        name=f"{kind} {size.name}",
        params=params(size, kind),
        dtype="bfloat16",
        prepare=partial(prepare_cache, kind, size, "cuda"),
        min_bytes=size.cache_bytes(row_bytes),
        bytes_of={CONTIGUOUS: size.cache_bytes(2.0 * HEAD_DIM)},
        bars={f"ratio to {CONTIGUOUS}": bar},
        quick=size is SIZES[0],
    )


GROUPS = (
    Group(
        "cuda-decode",
        "Decode, one query, bf16 cache, on a GPU",
        tuple(map(decode_case, SIZES)),
        mean_bars={CUDNN: 1.0},
        unit="us",
        device="cuda",
    ),
    Group(
        "cuda-caches",
        "Decode, one query, other caches against ours in bf16, on a GPU",
        tuple(cache_case(kind, size) for kind in CACHES for size in SIZES),
        unit="us",
        device="cuda",
    ),
)
