"""The cases that the tests and `onepass check` run for append_kv."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core import kv_formats
from onepass.core.registry import explain
from onepass.ops.append_kv import kernels
from onepass.ops.append_kv.api import append_kv
from onepass.testing.inputs import normal


@dataclass(frozen=True)
class AppendCase:
    """One problem of append_kv. What is compared is all that the caches hold, codes as numbers."""

    name: str
    stored: tuple[int, ...] = (5, 0, 9)  # cache_seqlens
    seqlen_new: int = 3
    capacity: int = 16
    nheads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    page_size: int | None = None
    cache_dtype: torch.dtype | None = None
    groups: tuple[int, int] | None = None  # of int4
    heads_first: bool = False

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        batch = len(self.stored)
        found: dict[str, Tensor] = {"cache_seqlens": torch.tensor(self.stored, dtype=torch.int32, device=device)}
        pages = (batch, self.capacity)
        if self.page_size is not None:
            per_row = self.capacity // self.page_size
            pages = (2 * batch * per_row, self.page_size)
            order = torch.randperm(pages[0], generator=generator)[: batch * per_row].view(batch, per_row)
            position = torch.arange(per_row) * self.page_size
            needed = position < (torch.tensor(self.stored) + self.seqlen_new).unsqueeze(1)
            found["page_table"] = torch.where(needed, order, -5).to(device, torch.int32)
        for place, (name, features) in enumerate((("k", self.head_dim), ("v", self.head_dim_v or self.head_dim))):
            shape = (batch, self.seqlen_new, self.nheads_kv, features)
            x = normal(shape, dtype, device, generator)
            if self.heads_first:
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            cache = normal((*pages, self.nheads_kv, features), dtype, device, generator)
            found[name] = x
            if self.groups is not None:
                cache, found[f"{name}_scale_shift"] = kv_formats.quantize_int4(cache, self.groups[place])
            elif self.cache_dtype is not None:
                largest = 127 if self.cache_dtype is torch.int8 else torch.finfo(self.cache_dtype).max
                descale = torch.rand((batch, self.nheads_kv), generator=generator).to(device) + 2.0
                found[f"{name}_descale"] = descale / largest
                cache = (cache.float() * largest / 10).to(self.cache_dtype)
            if self.heads_first:
                cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            found[f"{name}_cache"] = cache
        return found

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        names = ("k", "v", "k_cache", "v_cache", "cache_seqlens")
        return tuple(inputs[name] for name in names), {name: x for name, x in inputs.items() if name not in names}

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        """The caches after the call, and the pairs of int4; the inputs' own stay as they are."""
        written = ("k_cache", "v_cache", "k_scale_shift", "v_scale_shift")
        used = {name: x.clone() if name in written else x for name, x in inputs.items()}
        if used["k"].dtype is torch.float64:  # the oracle's caches have the format all the same
            used |= {name: used[name].to(self.cache_dtype) for name in written[:2] if self.cache_dtype is not None}
        positional, options = self.arguments(used)
        append_kv(*positional, **options, backend=backend)
        results = {name: used[name] for name in written if name in used}
        return {name: (x.view(torch.uint8) if x.itemsize == 1 else x).double() for name, x in results.items()}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        positional, options = self.arguments(inputs)
        return [
            backend
            for backend in kernels.APPEND.backends
            if explain("append_kv", *positional, **options, backend=backend)[0].backend == backend
        ]


CASES = [
    AppendCase("append"),
    AppendCase("append, one token", seqlen_new=1, stored=(15, 0)),
    AppendCase("append, long", seqlen_new=200, stored=(0, 51), capacity=256, nheads_kv=1, head_dim=64),
    AppendCase("append, head_dim 33, head_dim_v 72, heads first", head_dim=33, head_dim_v=72, heads_first=True),
    AppendCase("append, pages", page_size=4, stored=(5, 0, 13)),
    AppendCase("append, pages of one key", page_size=1, seqlen_new=5, heads_first=True),
    AppendCase("append, nothing new", seqlen_new=0),
    AppendCase("append, no sequences", stored=()),
    AppendCase("append, int8", cache_dtype=torch.int8),
    AppendCase("append, int8, pages", cache_dtype=torch.int8, page_size=8, head_dim=40),
    AppendCase("append, float8_e4m3fn", cache_dtype=torch.float8_e4m3fn),
    AppendCase("append, float8_e5m2, pages", cache_dtype=torch.float8_e5m2, page_size=4),
    AppendCase("append, int4", groups=(1, 1)),
    AppendCase("append, int4, groups, pages", groups=(4, 3), head_dim=64, head_dim_v=72, page_size=4),
    AppendCase("append, int4, heads first", groups=(2, 1), heads_first=True, seqlen_new=6),
]
