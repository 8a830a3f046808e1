"""Problems of attention_varlen for tests and `onepass check`; see inputs.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core.registry import explain
from onepass.ops.attention import kernels, spec
from onepass.ops.attention.api import attention
from onepass.ops.attention.api_varlen import attention_varlen
from onepass.ops.attention.error_terms import LSE_TERMS, option_terms, sizes_of_terms
from onepass.testing.inputs import normal

LAYOUTS = ("shd", "hsd", "fused", "sliced")
_DIFFERENTIABLE = ("q", "k", "v", "attn_bias", "attn_sink")


def cumulated(lengths: tuple[int, ...], device: str) -> Tensor:
    """cu_seqlens of lengths."""
    return torch.tensor((0, *torch.tensor(lengths).cumsum(0).tolist()), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class VarlenCase:
    """One problem of `attention_varlen`, forward and, without pages, backward. Keys that are not used hold NaN."""

    name: str
    seqlens_q: tuple[int, ...] = (33, 7, 20)
    seqlens_k: tuple[int, ...] = (33, 50, 5)
    used: tuple[int, ...] | None = None  # seqused_k
    page_size: int | None = None
    nheads_q: int = 2
    nheads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    causal: bool = False
    causal_alignment: str = "bottom_right"
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    bias: tuple[int, int, int, int] | None = None  # 1 = broadcast, 0 = the full size
    sink: bool = False
    key_mask: bool = False
    dropout_p: float = 0.0
    layout: str = "shd"
    longer: int = 0  # by which max_seqlen is larger than the longest

    @property
    def keys(self) -> tuple[int, ...]:
        """How many each sequence uses."""
        return self.seqlens_k if self.used is None else self.used

    @property
    def longest(self) -> tuple[int, int]:
        return max(self.seqlens_q, default=0) + self.longer, max(self.keys, default=0) + self.longer

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        batch, total_q, features = len(self.seqlens_q), sum(self.seqlens_q), self.head_dim_v or self.head_dim
        found = self._draw_qkv(dtype, device, generator)
        found["cu_seqlens_q"] = cumulated(self.seqlens_q, device)
        if self.page_size is None:
            found["cu_seqlens_k"] = cumulated(self.seqlens_k, device)
        if self.used is not None:
            found["seqused_k"] = torch.tensor(self.used, dtype=torch.int32, device=device)
        if self.bias is not None:
            full = (batch, self.nheads_q, *self.longest)
            sizes = tuple(size if size else whole for size, whole in zip(self.bias, full, strict=True))
            found["attn_bias"] = normal(sizes, dtype, device, generator)
        if self.alibi:
            found["alibi_slopes"] = torch.rand((batch, self.nheads_q), generator=generator).to(device)
        if self.sink:
            found["attn_sink"] = normal((self.nheads_q,), dtype, device, generator)
        if self.key_mask:
            mask = torch.rand(sum(self.seqlens_k), generator=generator) < 0.6
            mask[: self.seqlens_k[0]] = False  # one sequence without keys
            found["key_mask"] = mask.to(device)
        if self.dropout_p:
            found["rng_state"] = torch.randint(0, 2**62, (2,), generator=generator).to(device)
        found["do"] = normal((total_q, self.nheads_q, features), dtype, device, generator)
        found["dlse"] = normal((self.nheads_q, total_q), spec.lse_dtype(dtype), device, generator)
        return found

    def _draw_qkv(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        def draw(*shape: int) -> Tensor:
            return normal(shape, dtype, device, generator)

        total_q, total_k, hq, hkv, d = (
            sum(self.seqlens_q),
            sum(self.seqlens_k),
            self.nheads_q,
            self.nheads_kv,
            self.head_dim,
        )
        dv = self.head_dim_v or d
        if self.layout == "fused":  # one tensor, as a fused projection gives it
            q, k, v = draw(max(total_q, total_k), hq + 2 * hkv, d).split((hq, hkv, hkv), 1)
            q, k, v = q[:total_q], k[:total_k], v[:total_k, :, :dv]
        elif self.layout == "hsd":
            q, k, v = (
                draw(h, s, n).transpose(0, 1) for h, s, n in ((hq, total_q, d), (hkv, total_k, d), (hkv, total_k, dv))
            )
        elif self.layout == "sliced":
            q, k, v = (
                draw(2 * total_q, hq, 2 * d)[::2, :, ::2],
                draw(total_k + 3, hkv, d + 5)[3:, :, 5:],
                draw(total_k, hkv, 3 * dv)[..., ::3],
            )
        else:
            q, k, v = draw(total_q, hq, d), draw(total_k, hkv, d), draw(total_k, hkv, dv)
        if self.used is not None:
            first = 0
            for length, used in zip(self.seqlens_k, self.used, strict=True):
                k[first + used : first + length], v[first + used : first + length] = torch.nan, torch.nan
                first += length
        found = {"q": q, "k": k, "v": v}
        if self.page_size is not None:
            self._cut_into_pages(found, generator)
        return found

    def _cut_into_pages(self, found: dict[str, Tensor], generator: torch.Generator) -> None:
        """Pages in random order, as many again that hold NaN, and table entries past the used keys that name none."""
        size, device = self.page_size or 1, found["k"].device
        per_row = -(-max(self.seqlens_k) // size)
        order = torch.randperm(2 * len(self.keys) * per_row, generator=generator).view(2, len(self.keys), per_row)[0]
        used = torch.arange(per_row) * size < torch.tensor(self.keys).unsqueeze(1)
        for name in ("k", "v"):
            packed = found[name]
            pages = packed.new_full((2 * order.numel(), size, *packed.shape[1:]), torch.nan)
            for index, sequence in enumerate(packed.split(self.seqlens_k)):
                for place, page in enumerate(order[index].tolist()):
                    part = sequence[place * size : (place + 1) * size]
                    pages[page, : part.shape[0]] = part
            found[name] = pages
        found["page_table"] = torch.where(used, order, -7).to(device, torch.int32)

    def options(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of `attention_varlen`."""
        named = ("seqused_k", "page_table", "attn_bias", "alibi_slopes", "attn_sink", "key_mask", "rng_state")
        return {
            "max_seqlen_q": self.longest[0],
            "max_seqlen_k": self.longest[1],
            "causal": self.causal,
            "causal_alignment": self.causal_alignment,
            "softmax_scale": self.softmax_scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            **{name: inputs[name] for name in named if name in inputs},
        }

    def tensors(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The positional arguments."""
        return *(inputs[name] for name in ("q", "k", "v", "cu_seqlens_q")), inputs.get("cu_seqlens_k")

    def _differentiable(self, inputs: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        wanted = [name for name in _DIFFERENTIABLE if name in inputs and self.page_size is None]
        return wanted, {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        """out, lse, and the gradients of every differentiable input, as d<name>."""
        wanted, used = self._differentiable(inputs)
        out, lse = attention_varlen(*self.tensors(used), **self.options(used), return_lse=True, backend=backend)
        results = {"out": out.detach(), "lse": lse.detach()}
        if wanted:
            gradients = [inputs["do"], inputs["dlse"].to(lse.dtype)]
            found = torch.autograd.grad([out, lse], [used[name] for name in wanted], gradients)
            results |= {f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)}
        return results

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """As AttentionCase has them, the most of any sequence."""
        if 0 in (sum(self.seqlens_q), sum(self.keys)) or self.page_size is not None:  # no sums, or no gradients
            return {"lse": LSE_TERMS}
        exact = ("q", "k", "v", "do", "dlse", "attn_bias", "attn_sink")
        used = {name: x.double() if name in exact else x for name, x in inputs.items()}
        place = torch.cat([torch.arange(length) for length in self.seqlens_k])
        one_hot = torch.nn.functional.one_hot(place, max(self.seqlens_k)).to(used["v"])
        one_hot = one_hot.unsqueeze(1).expand(-1, self.nheads_kv, -1)
        all_p, all_lse = attention_varlen(
            *self.tensors({**used, "v": one_hot}), **self.options(used), return_lse=True, backend="reference"
        )
        group, first_q, first_k = self.nheads_q // self.nheads_kv, 0, 0
        largest = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
        of_scores = all_p.new_zeros(len(self.keys), self.nheads_q, *self.longest)
        whole = {"ds": of_scores, "delta of weights": of_scores.clone()}
        whole |= {"row": torch.zeros_like(all_lse), "delta": torch.zeros_like(all_lse)}
        for index, (length_q, length_k, keys) in enumerate(zip(self.seqlens_q, self.seqlens_k, self.keys, strict=True)):
            queries = slice(first_q, first_q + length_q)
            q, do = (used[name][queries].transpose(0, 1) for name in ("q", "do"))
            k, v = (
                used[name][first_k : first_k + keys].transpose(0, 1).repeat_interleave(group, 0) for name in ("k", "v")
            )
            p = all_p[queries].transpose(0, 1)[..., :keys]
            sizes = sizes_of_terms(p, all_lse[:, queries], q, k, v, do, used["dlse"][:, queries], self.softmax_scale)
            for name, size in sizes.items():
                if name in ("row", "delta"):
                    whole[name][:, queries] = size
                elif name in whole:
                    whole[name][index, :, :length_q, :keys] = size
                elif size.numel():
                    largest[name] = max(largest[name], float(size.max()))
            first_q, first_k = first_q + length_q, first_k + length_k
        of_options = option_terms(whole, all_lse, inputs)
        return {"lse": LSE_TERMS, **largest, **{name: float(size.max()) for name, size in of_options.items()}}

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """The backends that can do this case, forward and backward."""
        _, used = self._differentiable(inputs)
        able = []
        for backend in kernels.VARLEN_FORWARD.backends:
            verdict = explain("attention_varlen", *self.tensors(used), **self.options(used), backend=backend)
            if all(choice.backend == backend for choice in verdict):
                able.append(backend)
        return able

    def by_attention(self, inputs: Mapping[str, Tensor], backend: str) -> list[tuple[Tensor, Tensor]]:
        """out and lse of `attention` on each sequence alone, without dropout; not for pages."""
        options = self.options(inputs)
        bias, slopes, mask = (options.pop(name, None) for name in ("attn_bias", "alibi_slopes", "key_mask"))
        for name in ("max_seqlen_q", "max_seqlen_k", "seqused_k"):
            options.pop(name, None)
        results, first_q, first_k = [], 0, 0
        for index, (length_q, length_k, used) in enumerate(zip(self.seqlens_q, self.seqlens_k, self.keys, strict=True)):
            keys = slice(first_k, first_k + used)
            own = None if bias is None else bias.expand(len(self.keys), *bias.shape[1:])[index : index + 1]
            if own is not None:
                own = own[:, :, : length_q if own.shape[2] > 1 else 1, : used if own.shape[3] > 1 else 1]
            results.append(
                attention(
                    inputs["q"][None, first_q : first_q + length_q],
                    inputs["k"][None, keys],
                    inputs["v"][None, keys],
                    attn_bias=own,
                    alibi_slopes=None if slopes is None else slopes[index],
                    key_mask=None if mask is None else mask[None, keys],
                    **options,
                    return_lse=True,
                    backend=backend,
                )
            )
            first_q, first_k = first_q + length_q, first_k + length_k
        return results


CASES = [
    VarlenCase("varlen"),
    VarlenCase("varlen, causal", causal=True, seqlens_q=(70, 1, 130), seqlens_k=(70, 64, 131)),
    VarlenCase("varlen, causal, top left", causal=True, causal_alignment="top_left"),
    VarlenCase("varlen, empty sequences", seqlens_q=(0, 9, 0, 40, 0), seqlens_k=(5, 0, 0, 70, 0), causal=True),
    VarlenCase("varlen, no queries", seqlens_q=(0, 0), seqlens_k=(5, 9)),
    VarlenCase("varlen, no keys", seqlens_q=(5, 9), seqlens_k=(0, 0)),
    VarlenCase("varlen, no sequences", seqlens_q=(), seqlens_k=()),
    VarlenCase("varlen, one sequence, long max_seqlen", seqlens_q=(140,), seqlens_k=(150,), longer=77),
    VarlenCase("varlen, window", window_size=(13, 5), seqlens_q=(100, 9), seqlens_k=(140, 60)),
    VarlenCase(
        "varlen, grouped heads, head_dim 40, head_dim_v 72", nheads_q=6, head_dim=40, head_dim_v=72, causal=True
    ),
    *(VarlenCase(f"varlen, layout {x}", layout=x, nheads_q=4, causal=True) for x in LAYOUTS[1:]),
    VarlenCase("varlen, key_mask", key_mask=True),
    VarlenCase("varlen, softcap, alibi", softcap=2.5, alibi=True, causal=True),
    VarlenCase("varlen, bias", bias=(0, 0, 0, 0), longer=3),
    VarlenCase("varlen, bias of a key", bias=(1, 0, 1, 0), causal=True),
    VarlenCase("varlen, bias of a query", bias=(0, 1, 0, 1), seqlens_q=(33, 0, 90)),
    VarlenCase("varlen, sink", sink=True, causal=True, seqlens_k=(20, 50, 0)),
    VarlenCase("varlen, dropout", dropout_p=0.3, causal=True),
    VarlenCase("varlen, seqused_k", used=(30, 0, 5), causal=True),
    VarlenCase("varlen, seqused_k of nothing", used=(0, 0, 0), bias=(1, 1, 1, 1)),
    VarlenCase(
        "varlen, everything",
        nheads_q=4,
        used=(33, 44, 3),
        causal=True,
        window_size=(20, -1),
        softcap=4.0,
        alibi=True,
        bias=(0, 0, 0, 0),
        sink=True,
        key_mask=True,
        dropout_p=0.2,
    ),
    VarlenCase("varlen, pages", page_size=8, used=(33, 50, 0), causal=True, nheads_q=4),
    VarlenCase("varlen, pages of one key", page_size=1, used=(20, 3, 5), window_size=(6, 3)),
    VarlenCase("varlen, pages, bias, sink", page_size=16, used=(33, 50, 5), bias=(1, 0, 0, 0), sink=True, softcap=3.0),
]
