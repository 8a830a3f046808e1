"""The cases that the tests and `onepass check` run for rope."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onepass.core.registry import choose
from onepass.ops.rope import kernels, spec
from onepass.ops.rope.api import rope
from onepass.ops.rope.table import rope_table
from onepass.testing.inputs import normal, strided


@dataclass(frozen=True)
class RopeCase:
    """One problem of rope with the gradients of q and k."""

    name: str
    batch: int = 2
    seqlen: int = 7
    nheads_q: int = 4
    nheads_kv: int = 2
    head_dim: int = 32
    rotary_dim: int | None = None  # None: head_dim
    interleaved: bool = False
    table: str = "shared"  # or "batched", or "indexed" by position_ids
    id_dtype: torch.dtype = torch.int64
    amplitude: float = 1.0
    layout: str = "contiguous"  # also "heads first" (b, h, s, d), "packed" qkv, "strided" features

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        q, k = self._q_and_k(dtype, device, generator)
        rotary_dim = self.rotary_dim or self.head_dim
        found = {"q": q, "k": k}
        if self.table == "batched":
            positions = torch.rand((self.batch, self.seqlen), generator=generator, dtype=torch.float64) * 100
            found["cos"], found["sin"] = rope_table(rotary_dim, position_ids=positions, device=device)
        elif self.table == "indexed":
            longer = self.seqlen + 30
            found["cos"], found["sin"] = rope_table(rotary_dim, longer, device=device)
            ids = torch.randint(0, longer, (self.batch, self.seqlen), generator=generator)
            found["position_ids"] = ids.to(device, self.id_dtype)
        else:
            found["cos"], found["sin"] = rope_table(rotary_dim, self.seqlen, device=device)
        for name, x in (("dq_out", q), ("dk_out", k)):
            found[name] = normal(tuple(x.shape), dtype, device, generator)
        return found

    def _q_and_k(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        heads = (self.nheads_q, self.nheads_kv)
        if self.layout == "packed":
            shape = (self.batch, self.seqlen, self.nheads_q + 2 * self.nheads_kv, self.head_dim)
            packed = normal(shape, dtype, device, generator) * self.amplitude
            q, k, _ = packed.split((*heads, self.nheads_kv), 2)
        elif self.layout == "heads first":
            shapes = [(self.batch, n, self.seqlen, self.head_dim) for n in heads]
            q, k = ((normal(shape, dtype, device, generator) * self.amplitude).transpose(1, 2) for shape in shapes)
        else:
            shapes = [(self.batch, self.seqlen, n, self.head_dim) for n in heads]
            q, k = (strided(normal(shape, dtype, device, generator) * self.amplitude, self.layout) for shape in shapes)
        return q, k

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k = (inputs[name].detach().requires_grad_() for name in ("q", "k"))
        q_out, k_out = rope(
            q,
            k,
            inputs["cos"],
            inputs["sin"],
            interleaved=self.interleaved,
            position_ids=inputs.get("position_ids"),
            backend=backend,
        )
        dq, dk = torch.autograd.grad((q_out, k_out), (q, k), (inputs["dq_out"], inputs["dk_out"]))
        return {"q_out": q_out.detach(), "k_out": k_out.detach(), "dq": dq, "dk": dk}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """Each element is a sum of two products, at most the largest element each."""
        sources = {"q_out": "q", "k_out": "k", "dq": "dq_out", "dk": "dk_out"}
        return {
            name: 2 * float(inputs[source].double().abs().max())
            for name, source in sources.items()
            if inputs[source].numel()
        }

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        facts = spec.rope_facts(
            inputs["q"],
            inputs["k"],
            inputs["cos"],
            inputs["sin"],
            inputs.get("position_ids"),
            self.interleaved,
            False,
        )
        return [
            backend
            for backend in kernels.FORWARD.backends
            if choose(kernels.FORWARD, facts, backend).backend == backend
        ]


def _both(name: str, **options: object) -> list[RopeCase]:
    """Rotating halves and pairs."""
    return [
        RopeCase(f"{kind}, {name}", interleaved=kind == "pairs", **options)  # type: ignore[arg-type]
        for kind in ("halves", "pairs")
    ]


CASES = [
    *_both("plain"),
    *_both("rotary_dim 12 of 40", head_dim=40, rotary_dim=12),
    *_both("odd head_dim 33", head_dim=33, rotary_dim=30),
    *_both("smallest rotary_dim", head_dim=5, rotary_dim=2),
    *_both("cos and sin per batch", table="batched"),
    *_both("position_ids", table="indexed"),
    *_both("int32 position_ids, partial", table="indexed", id_dtype=torch.int32, head_dim=24, rotary_dim=16),
    *_both("heads first", layout="heads first"),
    *_both("packed qkv", layout="packed", head_dim=24, rotary_dim=16),
    *_both("features apart", layout="strided"),
    RopeCase("sliced", layout="sliced"),
    RopeCase("expanded", layout="expanded"),
    RopeCase("one token", seqlen=1),
    RopeCase("no tokens", seqlen=0),
    RopeCase("no batch", batch=0, table="indexed"),
    RopeCase("no key heads", nheads_kv=0),
    RopeCase("one key head", nheads_q=7, nheads_kv=1, seqlen=33),
    RopeCase("28 and 4 heads", nheads_q=28, nheads_kv=4, seqlen=3, head_dim=16),
    RopeCase("fewer query heads", nheads_q=1, nheads_kv=3),
    RopeCase("head_dim 128, 300 tokens", batch=1, seqlen=300, nheads_q=4, nheads_kv=1, head_dim=128),
    RopeCase("head_dim 512", seqlen=3, head_dim=512, nheads_q=2, nheads_kv=1),
    RopeCase("huge", amplitude=2e3),
    RopeCase("tiny", amplitude=1e-4),
]
