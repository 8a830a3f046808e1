"""The cases that the tests and `onepass check` run for swiglu and geglu."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onepass.core.registry import choose
from onepass.ops.swiglu import kernels, spec
from onepass.ops.swiglu.api import geglu, swiglu
from onepass.testing.inputs import normal, strided


@dataclass(frozen=True)
class SwigluCase:
    """One problem of swiglu (or geglu) with the gradients of both inputs."""

    name: str
    activation: str = "silu"
    shape: tuple[int, ...] = (6, 200)
    amplitude: float = 1.0
    layout: str = "contiguous"  # or "packed": gate and up are the halves of one tensor
    dout_layout: str = "contiguous"

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        if self.layout == "packed":
            packed = normal((*self.shape[:-1], 2 * self.shape[-1]), dtype, device, generator) * self.amplitude
            gate, up = packed.chunk(2, -1)
        else:
            gate = strided(normal(self.shape, dtype, device, generator) * self.amplitude, self.layout)
            up = strided(normal(self.shape, dtype, device, generator), self.layout)
        dout = strided(normal(self.shape, dtype, device, generator), self.dout_layout)
        return {"gate": gate, "up": up, "dout": dout}

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        gate, up = (inputs[name].detach().requires_grad_() for name in ("gate", "up"))
        if self.activation == "silu":
            out = swiglu(gate, up, backend=backend)
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            out = geglu(gate, up, approximate=approximate, backend=backend)
        dgate, dup = torch.autograd.grad(out, (gate, up), inputs["dout"])
        return {"out": out.detach(), "dgate": dgate, "dup": dup}

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """The slope's terms cancel where it is 0; gelu's value is x times a sum that cancels for negative x."""
        gate, up, dout = (inputs[name].double().abs() for name in ("gate", "up", "dout"))
        if gate.numel() == 0:
            return {}
        seen = torch.where(gate < 20, gate, 0.0)
        return {
            "out": float((seen * up).max()),
            "dgate": float((dout * up * (1.0 + seen)).max()),
            "dup": float((dout * seen).max()),
        }

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        facts = spec.swiglu_facts(inputs["gate"], inputs["up"], self.activation)
        tables = (kernels.FORWARD, kernels.BACKWARD)
        return [
            backend
            for backend in kernels.FORWARD.backends
            if all(choose(table, facts, backend).backend == backend for table in tables)
        ]


def _each(name: str, **options: object) -> list[SwigluCase]:
    functions = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu tanh"}
    return [
        SwigluCase(f"{function}, {name}", activation, **options)  # type: ignore[arg-type]
        for activation, function in functions.items()
    ]


CASES = [
    *_each("plain"),
    *_each("packed", shape=(3, 5, 136), layout="packed"),
    *_each("large gates", amplitude=8.0),
    *_each("huge gates", amplitude=2e3),
    *_each("tiny gates", amplitude=1e-4),
    SwigluCase("swiglu, one row", shape=(200,)),
    SwigluCase("swiglu, one column", shape=(5, 1)),
    SwigluCase("swiglu, no rows", shape=(0, 33)),
    SwigluCase("swiglu, no columns", shape=(3, 0)),
    SwigluCase("swiglu, three leading dimensions", shape=(2, 3, 4, 65)),
    SwigluCase("swiglu, many short rows", shape=(300, 17), layout="sliced"),
    SwigluCase("swiglu, 5000 columns", shape=(3, 5000), layout="packed"),
    SwigluCase("swiglu, odd columns", shape=(7, 1023), layout="packed"),
    *(
        SwigluCase(f"swiglu, {layout}", shape=(4, 5, 96), layout=layout)
        for layout in ("sliced", "transposed", "strided", "expanded")
    ),
    SwigluCase("swiglu, expanded dout", shape=(4, 5, 96), dout_layout="expanded"),
]
