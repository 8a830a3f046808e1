"""The cases that the tests and `onepass check` run for rms_norm and layer_norm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core.registry import choose
from onepass.ops.norm import kernels, spec
from onepass.ops.norm.api import layer_norm, rms_norm
from onepass.testing.inputs import normal, strided


@dataclass(frozen=True)
class NormCase:
    """One problem of rms_norm (or, centred, of layer_norm) with the gradients of all its inputs."""

    name: str
    center: bool = False
    shape: tuple[int, ...] = (6, 200)
    weight: bool = True
    bias: bool = False
    residual: bool = False
    offset: float = 0.0
    eps: float = 1e-5
    amplitude: float = 1.0
    mean: float = 0.0
    weight_dtype: torch.dtype | None = None  # None: x's
    layout: str = "contiguous"

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        columns = self.shape[-1]
        kind = self.weight_dtype or dtype
        found = {"x": strided(normal(self.shape, dtype, device, generator) * self.amplitude + self.mean, self.layout)}
        if self.weight:
            found["weight"] = normal((columns,), kind, device, generator)
        if self.bias:
            found["bias"] = normal((columns,), kind, device, generator)
        if self.residual:
            found["residual"] = strided(normal(self.shape, dtype, device, generator), self.layout)
            found["dresidual_out"] = normal(self.shape, dtype, device, generator)
        found["dy"] = normal(self.shape, dtype, device, generator)
        return found

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        names = [name for name in ("x", "weight", "bias", "residual") if name in inputs]
        used = {name: inputs[name].detach().requires_grad_() for name in names}
        results = self._forward(used, backend)
        gradients = [inputs[name] for name in ("dy", "dresidual_out")[: len(results)]]
        found = torch.autograd.grad(results, list(used.values()), gradients)
        outputs = dict(zip(("y", "residual_out"), (x.detach() for x in results), strict=False))
        return outputs | {f"d{name}": gradient for name, gradient in zip(names, found, strict=True)}

    def _forward(self, used: Mapping[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"eps": self.eps, "residual": used.get("residual"), "backend": backend}
        if self.center:
            result = layer_norm(used["x"], used.get("weight"), used.get("bias"), **options)
        else:
            result = rms_norm(used["x"], used.get("weight"), offset=self.offset, **options)
        return result if isinstance(result, tuple) else (result,)

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """What cancels: the terms of dx, and the sums over rows of dweight and dbias."""
        x, dy = inputs["x"].double(), inputs["dy"].double()
        if x.numel() == 0:
            return {}
        if self.residual:
            x = x + inputs["residual"].double()
        weight = inputs["weight"].double().abs() + abs(self.offset) if self.weight else 1.0
        size = x.abs() + (x.mean(-1, keepdim=True).abs() if self.center else 0.0)
        spread = x.var(-1, unbiased=False, keepdim=True) if self.center else x.square().mean(-1, keepdim=True)
        rstd = torch.rsqrt(spread + self.eps)
        xhat, g = size * rstd, dy.abs() * weight
        dx = rstd * (g + xhat * (g * xhat).mean(-1, keepdim=True) + g.mean(-1, keepdim=True))
        return {
            "y": float((xhat * weight).max()),
            "dx": float(dx.max()),
            "dresidual": float(dx.max()),
            "dweight": float((dy.abs() * xhat).view(-1, x.shape[-1]).sum(0).max()),
            "dbias": float(dy.abs().view(-1, x.shape[-1]).sum(0).max()),
        }

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        facts = spec.norm_facts(
            inputs["x"],
            inputs.get("weight"),
            inputs.get("bias"),
            inputs.get("residual"),
            self.eps,
            self.offset,
            self.center,
        )
        tables = (kernels.FORWARD, kernels.BACKWARD)
        return [
            backend
            for backend in kernels.FORWARD.backends
            if all(choose(table, facts, backend).backend == backend for table in tables)
        ]


def _both(name: str, **options: Any) -> list[NormCase]:
    return [
        NormCase(f"rms_norm, {name}", **options),
        NormCase(f"layer_norm, {name}", center=True, bias=True, **options),
    ]


CASES = [
    *_both("plain"),
    *_both("one row", shape=(200,)),
    *_both("one column", shape=(5, 1)),
    *_both("no rows", shape=(0, 33)),
    *_both("three leading dimensions", shape=(2, 3, 4, 65)),
    *_both("many short rows", shape=(300, 17)),
    *_both("4096 columns", shape=(9, 4096)),
    *_both("5000 columns", shape=(3, 5000)),
    *_both("20000 columns", shape=(3, 20000)),
    *_both("70000 columns", shape=(2, 70000)),
    *_both("residual", residual=True),
    *_both("residual, 20000 columns", shape=(2, 20000), residual=True),
    *_both("fp32 weight", weight_dtype=torch.float32),
    *_both("no weight", weight=False),
    *_both("huge", amplitude=1e4),
    *_both("tiny", amplitude=1e-4),
    *_both("far from zero", mean=30.0),
    *(
        _case
        for layout in ("sliced", "transposed", "expanded")
        for _case in _both(layout, shape=(4, 5, 96), layout=layout)
    ),
    NormCase("rms_norm, offset 1", offset=1.0),
    NormCase("layer_norm without bias", center=True),
]
