"""The cases that the tests and `onepass check` run for repeat_kv."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onepass.core.registry import choose
from onepass.ops.repeat_kv import kernels, spec
from onepass.ops.repeat_kv.api import repeat_kv
from onepass.testing.inputs import normal, strided


@dataclass(frozen=True)
class RepeatKvCase:
    """One problem of repeat_kv with its gradient."""

    name: str
    shape: tuple[int, int, int, int] = (2, 7, 3, 32)
    n_rep: int = 4
    layout: str = "contiguous"
    dout_layout: str = "contiguous"
    amplitude: float = 1.0

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        batch, seqlen, heads, head_dim = self.shape
        repeated = (batch, seqlen, heads * self.n_rep, head_dim)
        return {
            "x": self._drawn(self.shape, self.layout, dtype, device, generator),
            "dout": self._drawn(repeated, self.dout_layout, dtype, device, generator),
        }

    def _drawn(
        self, shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str, generator: torch.Generator
    ) -> Tensor:
        if layout == "heads first":
            batch, seqlen, heads, head_dim = shape
            x = normal((batch, heads, seqlen, head_dim), dtype, device, generator).transpose(1, 2)
        else:
            x = strided(normal(shape, dtype, device, generator), layout)
        return x * self.amplitude if self.amplitude != 1.0 else x

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x = inputs["x"].detach().requires_grad_()
        out = repeat_kv(x, self.n_rep, backend=backend)
        (dx,) = torch.autograd.grad(out, x, inputs["dout"])
        return {"out": out.detach(), "dx": dx}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        dout = inputs["dout"].double().abs()
        return {"dx": self.n_rep * float(dout.max())} if dout.numel() else {}

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        facts = spec.repeat_kv_facts(inputs["x"], self.n_rep)
        tables = (kernels.FORWARD, kernels.BACKWARD)
        return [
            backend
            for backend in kernels.FORWARD.backends
            if all(choose(table, facts, backend).backend == backend for table in tables)
        ]


CASES = [
    RepeatKvCase("plain"),
    RepeatKvCase("once", n_rep=1),
    RepeatKvCase("33 times, one head", shape=(2, 5, 1, 16), n_rep=33),
    RepeatKvCase("head_dim 33", shape=(2, 7, 3, 33)),
    RepeatKvCase("head_dim 1", shape=(2, 3, 2, 1)),
    RepeatKvCase("head_dim 3000", shape=(1, 2, 2, 3000), n_rep=2),
    RepeatKvCase("300 tokens", shape=(1, 300, 2, 128), n_rep=2),
    RepeatKvCase("no tokens", shape=(2, 0, 3, 32)),
    RepeatKvCase("no heads", shape=(2, 3, 0, 32)),
    RepeatKvCase("huge", amplitude=3e3),
    *(
        RepeatKvCase(layout, layout=layout, dout_layout=layout)
        for layout in ("heads first", "sliced", "strided", "expanded")
    ),
]
