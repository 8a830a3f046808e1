"""The cases that the tests and `onepass check` run for softmax."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onepass.core.registry import choose
from onepass.ops.softmax import kernels, spec
from onepass.ops.softmax.api import softmax
from onepass.testing.inputs import normal, strided


@dataclass(frozen=True)
class SoftmaxCase:
    """One problem of softmax with the gradient of its input."""

    name: str
    shape: tuple[int, ...] = (6, 200)
    amplitude: float = 1.0
    mean: float = 0.0
    masked: float = 0.0  # the share of -inf
    poisoned: bool = False  # rows of -inf, with +inf, with NaN, beside rows without
    layout: str = "contiguous"

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        x = normal(self.shape, dtype, device, generator) * self.amplitude + self.mean
        if self.masked:
            hidden = torch.rand(self.shape, generator=generator) < self.masked
            hidden[..., -1] = False
            x = x.masked_fill(hidden.to(device), -torch.inf)
        if self.poisoned:
            x[0] = -torch.inf
            x[2, 3], x[3, -1] = torch.inf, torch.nan
            x[4, : self.shape[-1] - 1] = -torch.inf
        return {"x": strided(x, self.layout), "dy": strided(normal(self.shape, dtype, device, generator), self.layout)}

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x = inputs["x"].detach().requires_grad_()
        y = softmax(x, backend=backend)
        (dx,) = torch.autograd.grad(y, x, inputs["dy"])
        return {"y": y.detach(), "dx": dx}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """dx is a difference, of y's rounding too: dy * y and y * sum(dy * y)."""
        x, dy = inputs["x"].double(), inputs["dy"].double()
        if x.numel() == 0:
            return {}
        y = torch.softmax(x, -1).nan_to_num()
        return {"dx": float((y * (dy.abs() + (dy.abs() * y).sum(-1, keepdim=True))).max())}

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        facts = spec.softmax_facts(inputs["x"])
        tables = (kernels.FORWARD, kernels.BACKWARD)
        return [
            backend
            for backend in kernels.FORWARD.backends
            if all(choose(table, facts, backend).backend == backend for table in tables)
        ]


CASES = [
    SoftmaxCase("plain"),
    SoftmaxCase("one row", shape=(200,)),
    SoftmaxCase("one column", shape=(5, 1)),
    SoftmaxCase("no rows", shape=(0, 33)),
    SoftmaxCase("three leading dimensions", shape=(2, 3, 4, 65)),
    SoftmaxCase("many short rows", shape=(300, 17)),
    SoftmaxCase("4096 columns", shape=(9, 4096)),
    SoftmaxCase("5000 columns", shape=(3, 5000)),
    SoftmaxCase("40000 columns", shape=(3, 40000)),
    SoftmaxCase("huge", amplitude=1e3),
    SoftmaxCase("tiny", amplitude=1e-4),
    SoftmaxCase("far from zero", mean=300.0),
    SoftmaxCase("masked", shape=(7, 300), masked=0.6),
    SoftmaxCase("40000 columns, masked", shape=(2, 40000), masked=0.9999),
    SoftmaxCase("rows of -inf, with inf and NaN", shape=(6, 150), poisoned=True),
    SoftmaxCase("40000 columns, rows of -inf, with inf and NaN", shape=(5, 40000), poisoned=True),
    *(SoftmaxCase(layout, shape=(4, 5, 96), layout=layout) for layout in ("sliced", "transposed", "expanded")),
]
