"""Problems of attention for tests and `onepass check`: how inputs are drawn, how a problem is run on a backend."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core import kv_formats
from onepass.core.registry import explain
from onepass.ops.attention import inputs_varlen, kernels, spec
from onepass.ops.attention.api import attention, attention_decode, merge_attention
from onepass.ops.attention.error_terms import LSE_TERMS, rounding_terms
from onepass.ops.attention.inputs_varlen import VarlenCase
from onepass.ops.quantize.api import quantize_kv_int4
from onepass.testing.inputs import normal

LAYOUTS = ("bshd", "bhsd", "packed", "v_transposed", "sliced", "expanded")
_DIFFERENTIABLE = ("q", "k", "v", "attn_bias", "attn_sink")


@dataclass(frozen=True)
class AttentionCase:
    """One problem of `attention`, forward and backward."""

    name: str
    batch: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    nheads_q: int = 2
    nheads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    causal: bool = False
    causal_alignment: str = "bottom_right"
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    bias: tuple[int, int, int, int] | None = None  # 1 = broadcast, 0 = the full size
    bias_fp32: bool = False  # else of q's dtype
    bias_hides: bool = False  # -inf in some of it
    sink: bool = False
    key_mask: bool = False
    dropout_p: float = 0.0
    layout: str = "bshd"
    amplitude: float = 1.0  # of q: how large the scores are
    gradients: tuple[str, ...] = _DIFFERENTIABLE
    through_lse: bool = True  # a random gradient for lse too

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        head_dim_v = self.head_dim_v or self.head_dim
        q, k, v = self._draw_qkv(head_dim_v, dtype, device, generator)
        found = {"q": q, "k": k, "v": v}
        rows = (self.batch, self.nheads_q, self.seqlen_q)
        if self.bias is not None:
            full = (*rows, self.seqlen_k)
            sizes = tuple(size if size else whole for size, whole in zip(self.bias, full, strict=True))
            bias = normal(sizes, spec.lse_dtype(dtype) if self.bias_fp32 else dtype, device, generator)
            if self.bias_hides:
                bias = bias.masked_fill((torch.rand(sizes, generator=generator) < 0.4).to(device), -torch.inf)
                bias[:1, :1, :1] = -torch.inf  # a query without keys
            found["attn_bias"] = bias
        if self.alibi:
            found["alibi_slopes"] = torch.rand((self.batch, self.nheads_q), generator=generator).to(device)
        if self.sink:
            found["attn_sink"] = normal((self.nheads_q,), dtype, device, generator)
        if self.key_mask:
            mask = torch.rand((self.batch, self.seqlen_k), generator=generator) < 0.6
            mask[:1] = False  # one sequence without keys
            found["key_mask"] = mask.to(device)
        if self.dropout_p:
            found["rng_state"] = torch.randint(0, 2**62, (2,), generator=generator).to(device)
        found["do"] = normal((self.batch, self.seqlen_q, self.nheads_q, head_dim_v), dtype, device, generator)
        found["dlse"] = normal(rows, spec.lse_dtype(dtype), device, generator)
        return found

    def _draw_qkv(
        self, head_dim_v: int, dtype: torch.dtype, device: str, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        def draw(*shape: int) -> Tensor:
            return normal(shape, dtype, device, generator)

        b, sq, sk, hq, hkv, d = (
            self.batch,
            self.seqlen_q,
            self.seqlen_k,
            self.nheads_q,
            self.nheads_kv,
            self.head_dim,
        )
        if self.layout == "packed":  # one tensor, as a fused projection gives it: nheads_q + 2 nheads_kv heads
            packed = draw(b, max(sq, sk), hq + 2 * hkv, d)
            q, k, v = packed.split((hq, hkv, hkv), 2)
            q, k, v = q[:, :sq], k[:, :sk], v[:, :sk, :, :head_dim_v]
        elif self.layout == "bhsd":
            q, k, v = (
                draw(b, h, s, n).transpose(1, 2) for h, s, n in ((hq, sq, d), (hkv, sk, d), (hkv, sk, head_dim_v))
            )
        elif self.layout == "v_transposed":
            q, k, v = draw(b, sq, hq, d), draw(b, sk, hkv, d), draw(b, hkv, head_dim_v, sk).permute(0, 3, 1, 2)
        elif self.layout == "sliced":  # every dimension strided
            q = draw(b, 2 * sq, hq, 2 * d)[:, ::2, :, ::2]
            k = draw(b, sk + 3, hkv, d + 5)[:, 3:, :, 5:]
            v = draw(b, sk, 2 * hkv, 3 * head_dim_v)[:, :, ::2, ::3]
        elif self.layout == "expanded":
            q = draw(b, sq, hq, d)
            k = draw(1, sk, 1, d).expand(b, sk, hkv, d)
            v = draw(b, 1, hkv, head_dim_v).expand(b, sk, hkv, head_dim_v)
        else:
            q, k, v = draw(b, sq, hq, d), draw(b, sk, hkv, d), draw(b, sk, hkv, head_dim_v)
        if self.amplitude != 1.0:
            q = q.mul_(self.amplitude) if self.layout != "packed" else q * self.amplitude
        return q, k, v

    def options(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of `attention`."""
        named = ("attn_bias", "alibi_slopes", "attn_sink", "key_mask", "rng_state")
        return {
            "causal": self.causal,
            "causal_alignment": self.causal_alignment,
            "softmax_scale": self.softmax_scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            **{name: inputs[name] for name in named if name in inputs},
        }

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        """out, lse, and the gradients of every differentiable input, as d<name>."""
        wanted = [name for name in self.gradients if name in inputs]
        used = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
        out, lse = attention(used["q"], used["k"], used["v"], **self.options(used), return_lse=True, backend=backend)
        results = {"out": out.detach(), "lse": lse.detach()}
        if not wanted:
            return results
        outputs, gradients = [out], [inputs["do"]]
        if self.through_lse:
            outputs, gradients = [out, lse], [inputs["do"], inputs["dlse"].to(lse.dtype)]
        found = torch.autograd.grad(outputs, [used[name] for name in wanted], gradients)
        return results | {f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        if 0 in (self.batch, self.seqlen_q, self.seqlen_k):
            return {"lse": LSE_TERMS}
        return rounding_terms(inputs, self.options(inputs))

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """The backends that can do this case, forward and backward."""
        used = {name: x.detach().requires_grad_(name in self.gradients) for name, x in inputs.items()}
        able = []
        for backend in kernels.FORWARD.backends:
            verdict = explain("attention", used["q"], used["k"], used["v"], **self.options(used), backend=backend)
            if all(choice.backend == backend for choice in verdict):
                able.append(backend)
        return able


def _quantized(cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cache in int8 or fp8, and its scales (batch, nheads_kv)."""
    largest = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    descale = cache.float().abs().amax((1, 3)).clamp(min=1e-6) / largest
    scaled = cache.float() / descale[:, None, :, None]
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), descale


@dataclass(frozen=True)
class DecodeCase:
    """One problem of `attention_decode`. What lies past cache_seqlens, and every unused page, holds NaN."""

    name: str
    lengths: tuple[int, ...] | None = (40, 7)  # cache_seqlens; None: full caches
    seqlen_q: int = 1
    capacity: int = 48
    nheads_q: int = 4
    nheads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    sink: bool = False
    page_size: int | None = None
    num_splits: int | None = None
    heads_first: bool = False  # caches as views of (batch, nheads_kv, capacity, head_dim)
    cache_dtype: torch.dtype | None = None  # of quantised caches
    groups: tuple[int, int] | None = None  # of int4 caches, in k and v

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        batch = 2 if self.lengths is None else len(self.lengths)
        found = {"q": normal((batch, self.seqlen_q, self.nheads_q, self.head_dim), dtype, device, generator)}
        for name, features in (("k_cache", self.head_dim), ("v_cache", self.head_dim_v or self.head_dim)):
            if self.heads_first:
                cache = normal((batch, self.nheads_kv, self.capacity, features), dtype, device, generator).transpose(
                    1, 2
                )
            else:
                cache = normal((batch, self.capacity, self.nheads_kv, features), dtype, device, generator)
            unused: float = torch.nan
            if self.cache_dtype is not None:
                cache, found[f"{name[0]}_descale"] = _quantized(cache, self.cache_dtype)
                unused = torch.nan if cache.is_floating_point() else 77
            if self.groups is not None:
                groups = self.groups[name == "v_cache"]
                cache, pairs = quantize_kv_int4(cache, groups=groups)
                for index, length in enumerate(self.lengths or ()):
                    pairs[index, length:] = torch.nan
                found[f"{name[0]}_scale_shift"], unused = pairs, 77
            for index, length in enumerate(self.lengths or ()):
                cache[index, length:] = unused
            found[name] = cache
        if self.lengths is not None:
            found["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        if self.page_size is not None:
            self._cut_into_pages(found, generator)
        if self.alibi:
            found["alibi_slopes"] = torch.rand((batch, self.nheads_q), generator=generator).to(device)
        if self.sink:
            found["attn_sink"] = normal((self.nheads_q,), dtype, device, generator)
        return found

    def _cut_into_pages(self, found: dict[str, Tensor], generator: torch.Generator) -> None:
        """Pages in random order, as many again that hold NaN, and table entries past the end that name no page."""
        size = self.page_size or 1
        batch, capacity = found["k_cache"].shape[:2]
        per_row = capacity // size
        order = torch.randperm(2 * batch * per_row, generator=generator)[: batch * per_row].view(batch, per_row)
        for name in ("k_cache", "v_cache", "k_scale_shift", "v_scale_shift"):
            if name not in found:
                continue
            cache = found[name]
            unused = torch.nan if cache.is_floating_point() else 77
            pages = torch.empty((2 * batch * per_row, size, *cache.shape[2:]), dtype=cache.dtype, device=cache.device)
            pages.fill_(unused)
            pages[order.to(cache.device)] = cache.unflatten(1, (per_row, size))
            found[name] = pages
        used = torch.arange(per_row) * size < found["cache_seqlens"].cpu().unsqueeze(1)
        found["page_table"] = torch.where(used, order, -1).to(found["q"].device, torch.int32)

    def options(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        scales = ("k_descale", "v_descale", "k_scale_shift", "v_scale_shift")
        named = ("cache_seqlens", "page_table", "alibi_slopes", "attn_sink", *scales)
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "num_splits": self.num_splits,
            **{name: inputs[name] for name in named if name in inputs},
        }

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        out, lse = attention_decode(
            inputs["q"],
            inputs["k_cache"],
            inputs["v_cache"],
            **self.options(inputs),
            return_lse=True,
            backend=backend,
        )
        return {"out": out, "lse": lse}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        if 0 in inputs["q"].shape:
            return {"lse": LSE_TERMS}
        if self.groups is not None:
            values = kv_formats.dequantize_int4(inputs["v_cache"], inputs["v_scale_shift"])
            return {"lse": LSE_TERMS, "out": float(values.nan_to_num(0.0).abs().max())}
        exact = {name: inputs[name].double() for name in ("q", "k_cache", "v_cache")}
        sizes = {**inputs, **exact, "v_cache": exact["v_cache"].abs()}
        if "attn_sink" in inputs:
            sizes["attn_sink"] = inputs["attn_sink"].double()
        return {"lse": LSE_TERMS, "out": float(self.call(sizes, "reference")["out"].max())}

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
        options = self.options(inputs)
        return [
            backend
            for backend in kernels.DECODE.backends
            if explain("attention_decode", q, k, v, **options, backend=backend)[0].backend == backend
        ]


@dataclass(frozen=True)
class MergeCase:
    """One problem of `merge_attention`: results over `parts` sets of keys, some of them empty."""

    name: str
    parts: int = 3
    sizes: tuple[int, ...] = (2, 9, 4, 24)  # batch, seqlen_q, nheads_q, head_dim_v, or packed without batch
    empty: bool = True

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        *leading, seqlen, nheads, _ = self.sizes
        rows = (*leading, nheads, seqlen)
        lses = 3 * normal((self.parts, *rows), spec.lse_dtype(dtype), device, generator)
        outs = normal((self.parts, *self.sizes), dtype, device, generator)
        if self.empty:
            hidden = torch.rand(lses.shape, generator=generator).to(device) < 0.3
            hidden[:, ..., 0] = True  # a row that no part has keys for
            lses = lses.masked_fill(hidden, -torch.inf)
            outs = outs.masked_fill(hidden.transpose(-1, -2).unsqueeze(-1), 0.0)
        return {
            "outs": outs,
            "lses": lses,
            "do": normal(self.sizes, dtype, device, generator),
            "dlse": normal(rows, spec.lse_dtype(dtype), device, generator),
        }

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        outs, lses = (inputs[name].detach().requires_grad_() for name in ("outs", "lses"))
        out, lse = merge_attention(outs, lses, backend=backend)
        douts, dlses = torch.autograd.grad([out, lse], [outs, lses], [inputs["do"], inputs["dlse"]])
        return {"out": out.detach(), "lse": lse.detach(), "douts": douts, "dlses": dlses}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        do, outs = inputs["do"].abs().double(), inputs["outs"].abs().double()
        return {"lse": 1.0, "dlses": 2 * float((do * outs.amax(0)).sum(-1).max())}

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        outs, lses = (inputs[name].detach().requires_grad_() for name in ("outs", "lses"))
        return [
            backend
            for backend in kernels.MERGE.backends
            if all(choice.backend == backend for choice in explain("merge_attention", outs, lses, backend=backend))
        ]


_ODD_HEAD_DIMS = (1, 33, 40, 72, 80, 96, 160, 256)

CASES: list[AttentionCase | VarlenCase | DecodeCase | MergeCase] = [
    AttentionCase("plain", seqlen_q=130, seqlen_k=130),
    AttentionCase("causal", seqlen_q=97, seqlen_k=97, causal=True),
    AttentionCase("causal, longer keys", seqlen_q=21, seqlen_k=70, causal=True),
    AttentionCase("causal, longer queries", seqlen_q=70, seqlen_k=21, causal=True),
    AttentionCase("causal, top left", seqlen_q=70, seqlen_k=21, causal=True, causal_alignment="top_left"),
    AttentionCase("one query", seqlen_q=1, seqlen_k=77),
    AttentionCase("one key", seqlen_q=50, seqlen_k=1),
    AttentionCase("one of each", batch=1, seqlen_q=1, seqlen_k=1, nheads_q=1, nheads_kv=1),
    AttentionCase("no keys", seqlen_k=0),
    AttentionCase("no queries", seqlen_q=0),
    AttentionCase("empty batch", batch=0),
    *(AttentionCase(f"head_dim {d}", head_dim=d, seqlen_q=37, seqlen_k=45, causal=d % 2 == 0) for d in _ODD_HEAD_DIMS),
    AttentionCase("head_dim 192, head_dim_v 128", head_dim=192, head_dim_v=128, causal=True),
    AttentionCase("head_dim 16, head_dim_v 40", head_dim=16, head_dim_v=40),
    AttentionCase("grouped heads", nheads_q=8, nheads_kv=2, causal=True),
    AttentionCase("one KV head", nheads_q=7, nheads_kv=1),
    AttentionCase("window", seqlen_q=60, seqlen_k=90, window_size=(13, 5)),
    AttentionCase("window, top left", seqlen_q=90, seqlen_k=60, window_size=(7, 0), causal_alignment="top_left"),
    AttentionCase("causal window", seqlen_q=100, seqlen_k=100, window_size=(16, -1), causal=True),
    AttentionCase("window of one key", window_size=(0, 0)),
    AttentionCase("key_mask", seqlen_q=40, seqlen_k=66, key_mask=True, causal=True),
    AttentionCase("scale 0", softmax_scale=0.0),
    AttentionCase("negative scale", softmax_scale=-0.3, causal=True),
    AttentionCase("huge scores", amplitude=300.0),
    AttentionCase("tiny scores", amplitude=1e-4),
    *(AttentionCase(f"layout {x}", layout=x, nheads_q=4, seqlen_k=40, causal=True) for x in LAYOUTS[1:]),
    AttentionCase("softcap", softcap=2.5, amplitude=3.0, causal=True),
    AttentionCase("alibi", alibi=True, causal=True, seqlen_k=50),
    AttentionCase("bias", bias=(0, 0, 0, 0)),
    AttentionCase("bias, broadcast", bias=(1, 0, 1, 0), causal=True),
    AttentionCase("bias, one batch", bias=(1, 0, 0, 0), batch=3, seqlen_q=70, seqlen_k=130, causal=True),
    AttentionCase("bias, one head", bias=(0, 1, 0, 0), nheads_q=4, seqlen_q=70, seqlen_k=150),
    AttentionCase("bias, one query", bias=(0, 0, 1, 0), seqlen_q=70, seqlen_k=150, window_size=(30, 20)),
    AttentionCase("bias, one key", bias=(0, 0, 0, 1), seqlen_q=70, seqlen_k=300),
    AttentionCase("bias, one sheet", bias=(1, 1, 0, 0), nheads_q=4, seqlen_q=70, seqlen_k=150),
    AttentionCase("bias, one number", bias=(1, 1, 1, 1)),
    AttentionCase("bias, fp32, hides keys", bias=(0, 1, 0, 0), bias_fp32=True, bias_hides=True, seqlen_k=70),
    AttentionCase("sink", sink=True, key_mask=True, causal=True),
    AttentionCase("sink, no keys", sink=True, seqlen_k=0),
    AttentionCase("dropout", dropout_p=0.3, causal=True),
    AttentionCase("dropout, grouped heads", dropout_p=0.5, nheads_q=4, nheads_kv=1, seqlen_q=70, seqlen_k=100),
    AttentionCase("few queries, softcap, alibi, sink", seqlen_q=2, seqlen_k=90, softcap=3.0, alibi=True, sink=True),
    AttentionCase("few queries, bias, dropout", seqlen_q=2, seqlen_k=90, bias=(0, 0, 0, 0), dropout_p=0.4),
    AttentionCase(
        "everything",
        nheads_q=4,
        seqlen_k=50,
        causal=True,
        window_size=(20, -1),
        softcap=4.0,
        alibi=True,
        bias=(0, 0, 0, 0),
        sink=True,
        key_mask=True,
        dropout_p=0.2,
    ),
    *inputs_varlen.CASES,
    DecodeCase("decode"),
    DecodeCase("decode, full caches", lengths=None),
    DecodeCase("decode, empty caches", lengths=(0, 5, 48)),
    DecodeCase("decode, several queries", lengths=(40, 2, 7), seqlen_q=3),
    DecodeCase("decode, not causal", seqlen_q=4, causal=False),
    DecodeCase("decode, long", lengths=(700, 1024), capacity=1024, nheads_q=8, head_dim=64),
    DecodeCase("decode, 3 splits", lengths=(200, 129), capacity=256, num_splits=3),
    DecodeCase("decode, window", seqlen_q=2, window_size=(9, -1)),
    DecodeCase("decode, head_dim 40, head_dim_v 72", head_dim=40, head_dim_v=72, heads_first=True),
    DecodeCase("decode, softcap, alibi, sink", softcap=3.0, alibi=True, sink=True),
    DecodeCase("decode, pages", page_size=8, lengths=(40, 7, 0)),
    DecodeCase("decode, pages of 1", page_size=1, lengths=(40, 7), seqlen_q=3, alibi=True),
    DecodeCase("decode, pages of 48", page_size=48, lengths=(40, 200), capacity=240, num_splits=3, nheads_q=8),
    DecodeCase(
        "decode, pages of 256", page_size=256, lengths=(700, 256, 3), capacity=768, window_size=(300, -1), seqlen_q=2
    ),
    DecodeCase("decode, int8, pages", cache_dtype=torch.int8, page_size=8, head_dim=40, lengths=(48, 0, 9)),
    DecodeCase("decode, float8_e4m3fnuz", cache_dtype=torch.float8_e4m3fnuz, heads_first=True, sink=True),
    DecodeCase("decode, float8_e5m2fnuz", cache_dtype=torch.float8_e5m2fnuz, head_dim=72, softcap=2.0),
    DecodeCase("decode, int8", cache_dtype=torch.int8, seqlen_q=2),
    DecodeCase("decode, float8_e4m3fn", cache_dtype=torch.float8_e4m3fn, num_splits=2),
    DecodeCase("decode, float8_e5m2, pages", cache_dtype=torch.float8_e5m2, page_size=4, window_size=(20, -1)),
    DecodeCase("decode, int4", groups=(1, 1), head_dim=64),
    DecodeCase("decode, int4, many rows", groups=(1, 1), head_dim=64, lengths=(48,) * 4, seqlen_q=4, nheads_q=16),
    DecodeCase("decode, int4, groups", groups=(4, 2), head_dim=64, head_dim_v=32, seqlen_q=2, sink=True),
    DecodeCase(  # all weights are rounded the same way
        "decode, int4, weights nearly alike",
        groups=(1, 1),
        lengths=None,
        capacity=2048,
        nheads_kv=1,
        head_dim=64,
        softmax_scale=2e-5,
    ),
    DecodeCase("decode, int4, long", groups=(1, 1), lengths=(700, 1024), capacity=1024, head_dim=128, nheads_q=8),
    DecodeCase(
        "decode, int4, pages", groups=(1, 2), head_dim=40, page_size=4, window_size=(20, -1), lengths=(40, 7, 0)
    ),
    DecodeCase(
        "decode, int4, pages of 256", groups=(2, 1), page_size=256, lengths=(700, 0), capacity=768, num_splits=3
    ),
    DecodeCase("decode, int4, 2 splits", groups=(1, 1), num_splits=2, softcap=3.0, alibi=True, heads_first=True),
    MergeCase("merge"),
    MergeCase("merge, packed", sizes=(9, 4, 24)),
    MergeCase("merge of one", parts=1, empty=False),
]
