"""The cases that the tests and `onepass check` run for cross_entropy and linear_cross_entropy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onepass.core import device
from onepass.core.registry import choose
from onepass.ops.cross_entropy import kernels, spec
from onepass.ops.cross_entropy.api import cross_entropy, linear_cross_entropy
from onepass.testing.inputs import normal, strided

_IGNORED = -100


def _targets(shape: tuple[int, ...], classes: int, ignored: float, place: str, generator: torch.Generator) -> Tensor:
    target = torch.randint(classes, shape, generator=generator)
    hidden = torch.rand(shape, generator=generator) < ignored
    if target.numel() and not ignored >= 1:
        hidden.view(-1)[0] = False
    return target.masked_fill(hidden, _IGNORED).to(place)


def _backends(x: Tensor) -> list[str]:
    facts = spec.CrossEntropySpec(device.arch(x), x.dtype)
    tables = (kernels.FORWARD, kernels.BACKWARD, kernels.REDUCE)
    return [
        backend
        for backend in kernels.FORWARD.backends
        if all(choose(table, facts, backend).backend == backend for table in tables)
    ]


@dataclass(frozen=True)
class Options:
    """Those of both functions."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    reduction: str = "mean"
    return_lse: bool = False

    def given(self, backend: str) -> dict[str, Any]:
        return vars(self) | {"ignore_index": _IGNORED, "backend": backend}


_NO_OPTIONS = Options()


def _results(result: Any) -> dict[str, Tensor]:
    return dict(zip(("loss", "lse"), result if isinstance(result, tuple) else (result,), strict=False))


def _gradients_in(options: Options, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Random gradients of the results, fp32 as they are."""
    found = {"dloss": torch.randn(shape if options.reduction == "none" else (), generator=generator)}
    if options.return_lse:
        found["dlse"] = torch.randn(shape, generator=generator)
    return found


def _differentiated(
    results: Mapping[str, Tensor], used: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    dresults = [inputs[f"d{name}"].to(result.dtype) for name, result in results.items()]
    found = torch.autograd.grad(list(results.values()), list(used.values()), dresults)
    return {name: result.detach() for name, result in results.items()} | {
        f"d{name}": gradient for name, gradient in zip(used, found, strict=True)
    }


@dataclass(frozen=True)
class CrossEntropyCase:
    """One problem of cross_entropy with the gradient of its logits."""

    name: str
    shape: tuple[int, ...] = (6, 200)
    options: Options = _NO_OPTIONS
    amplitude: float = 1.0
    mean: float = 0.0
    ignored: float = 0.2  # the share of rows
    masked: float = 0.0  # the share of -inf among the logits
    poisoned: bool = False  # rows of -inf, with +inf, with NaN, beside rows without
    layout: str = "contiguous"

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        x = normal(self.shape, dtype, device, generator) * self.amplitude + self.mean
        target = _targets(self.shape[:-1], self.shape[-1], self.ignored, device, generator)
        if self.masked:
            hidden = torch.rand(self.shape, generator=generator).to(device) < self.masked
            x = x.masked_fill(hidden.scatter(-1, target.clamp(min=0).unsqueeze(-1), False), -torch.inf)
        if self.poisoned:
            x[0] = -torch.inf
            x[2, 3], x[3, -1] = torch.inf, torch.nan
        gradients = {
            name: gradient.to(device)
            for name, gradient in _gradients_in(self.options, self.shape[:-1], generator).items()
        }
        return {"logits": strided(x, self.layout), "target": target, **gradients}

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        used = {"logits": inputs["logits"].detach().requires_grad_()}
        results = _results(cross_entropy(used["logits"], inputs["target"], **self.options.given(backend)))
        return _differentiated(results, used, inputs)

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss is a difference of lse and a logit (a sum of such); dlogits one of p and 1."""
        x = inputs["logits"].double()
        if x.numel() == 0:
            return {}
        size = float(x[x.isfinite()].abs().max())
        if self.options.softcap:
            size = min(size, self.options.softcap)
        lse = size + float(torch.tensor(self.shape[-1]).log())
        rows = x.numel() // x.shape[-1]
        loss = 2 * lse + self.options.z_loss * lse**2
        g = float(inputs["dloss"].abs().max()) * (1 + 2 * self.options.z_loss * lse)
        if "dlse" in inputs:
            g += float(inputs["dlse"].abs().max())
        g /= max(1, int((inputs["target"] != _IGNORED).sum())) if self.options.reduction == "mean" else 1
        # exp(x - lse) turns lse's rounding, relative to lse, into its own.
        return {
            "loss": loss * (rows if self.options.reduction == "sum" else 1),
            "lse": lse,
            "dlogits": g * (1 + lse),
        }

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        return _backends(inputs["logits"])


@dataclass(frozen=True)
class LinearCase:
    """One problem of linear_cross_entropy with the gradients of all its inputs."""

    name: str
    shape: tuple[int, ...] = (37, 24)
    classes: int = 150
    bias: bool = False
    low_memory: bool = False
    options: Options = _NO_OPTIONS
    weight_dtype: torch.dtype | None = None  # None: x's
    ignored: float = 0.2
    layout: str = "contiguous"

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        kind = self.weight_dtype or dtype
        features = self.shape[-1]
        found = {
            "x": strided(normal(self.shape, dtype, device, generator), self.layout),
            "weight": normal((self.classes, features), kind, device, generator) * features**-0.5,
        }
        if self.bias:
            found["bias"] = normal((self.classes,), kind, device, generator)
        target = _targets(self.shape[:-1], self.classes, self.ignored, device, generator)
        gradients = _gradients_in(self.options, self.shape[:-1], generator)
        return found | {"target": target} | {name: gradient.to(device) for name, gradient in gradients.items()}

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        names = [name for name in ("x", "weight", "bias") if name in inputs]
        used = {name: inputs[name].detach().requires_grad_() for name in names}
        result = linear_cross_entropy(
            used["x"],
            used["weight"],
            inputs["target"],
            bias=used.get("bias"),
            low_memory=self.low_memory,
            **self.options.given(backend),
        )
        return _differentiated(_results(result), used, inputs)

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """The sums over classes and rows, of halves where the logits and their gradients are halves."""
        x, weight = inputs["x"].double().flatten(0, -2), inputs["weight"].double()
        if x.numel() == 0:
            return {}
        # The logits' rounding is the inputs' own: in units of fp32's.
        unit = torch.finfo(inputs["x"].dtype).eps / torch.finfo(torch.float32).eps
        logits = x.abs() @ weight.abs().T
        size = float(logits.max()) * unit
        g = torch.ones(len(x), device=x.device) * inputs["dloss"].abs().reshape(-1)
        if "dlse" in inputs:
            g = g + inputs["dlse"].abs().reshape(-1)
        if self.options.reduction == "mean":
            g = g / max(1, int((inputs["target"] != _IGNORED).sum()))
        largest = float(g.max())
        rows = len(x) if self.options.reduction == "sum" else 1
        return {
            "loss": size * rows,
            "lse": size,
            "dx": 2 * largest * float(weight.abs().max()) * unit,
            "dweight": float((g.double().unsqueeze(-1) * x.abs()).sum(0).max()) * unit,
            "dbias": float(g.sum()) * unit,
        }

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        return _backends(inputs["x"])


_ALL = Options(label_smoothing=0.1, z_loss=1e-3, softcap=5.0, reduction="sum")
_LSE = Options(label_smoothing=0.1, z_loss=1e-2, softcap=5.0, reduction="none", return_lse=True)

CASES = [
    CrossEntropyCase("plain"),
    CrossEntropyCase("one row", shape=(200,)),
    CrossEntropyCase("one class", shape=(5, 1)),
    CrossEntropyCase("no rows", shape=(0, 33), options=Options(reduction="sum")),
    CrossEntropyCase("no rows, mean", shape=(0, 33)),
    CrossEntropyCase("three leading dimensions", shape=(2, 3, 4, 65), options=Options(reduction="none")),
    CrossEntropyCase("many short rows", shape=(300, 17)),
    CrossEntropyCase("20000 rows", shape=(20000, 3)),
    CrossEntropyCase("4096 classes", shape=(9, 4096)),
    CrossEntropyCase("40000 classes", shape=(3, 40000)),
    CrossEntropyCase("sum", options=Options(reduction="sum")),
    CrossEntropyCase("none", options=Options(reduction="none")),
    CrossEntropyCase("label smoothing", options=Options(label_smoothing=0.1)),
    CrossEntropyCase("label smoothing alone", options=Options(label_smoothing=1.0)),
    CrossEntropyCase("z-loss", options=Options(z_loss=1e-2)),
    CrossEntropyCase("softcap", options=Options(softcap=3.0)),
    CrossEntropyCase("softcap far from its bounds", options=Options(softcap=300.0)),
    CrossEntropyCase("lse", options=Options(return_lse=True)),
    CrossEntropyCase("every option", options=_ALL),
    CrossEntropyCase("every option, lse", options=_LSE),
    CrossEntropyCase("every option, lse, 5000 classes", shape=(4, 5000), options=_LSE),
    CrossEntropyCase("nothing ignored", ignored=0.0),
    CrossEntropyCase("all ignored", ignored=1.0),
    CrossEntropyCase("all ignored, lse", ignored=1.0, options=_LSE),
    CrossEntropyCase("huge", amplitude=1e3),
    CrossEntropyCase("tiny", amplitude=1e-4),
    CrossEntropyCase("far from zero", mean=300.0),
    CrossEntropyCase("masked", shape=(7, 300), masked=0.6),
    CrossEntropyCase("5000 classes, masked", shape=(5, 5000), masked=0.999),
    CrossEntropyCase("rows of -inf, with inf and NaN", poisoned=True, ignored=0.0, options=Options(reduction="none")),
    CrossEntropyCase("5000 classes, rows of -inf, with inf and NaN", (4, 5000), poisoned=True, options=_LSE),
    *(CrossEntropyCase(layout, shape=(4, 5, 96), layout=layout) for layout in ("sliced", "transposed", "expanded")),
    LinearCase("linear"),
    LinearCase("linear, sum, bias", bias=True, options=Options(reduction="sum")),
    LinearCase("linear, none, bias", bias=True, options=Options(reduction="none")),
    LinearCase("linear, low memory", low_memory=True),
    LinearCase("linear, low memory, every option", bias=True, low_memory=True, options=_ALL),
    LinearCase("linear, every option", bias=True, options=_ALL),
    LinearCase("linear, every option, lse", bias=True, options=_LSE),
    LinearCase("linear, lse of a mean", options=Options(return_lse=True)),
    LinearCase("linear, fp32 weight", bias=True, weight_dtype=torch.float32),
    LinearCase("linear, fp32 weight, low memory", low_memory=True, weight_dtype=torch.float32),
    LinearCase("linear, leading dimensions", shape=(2, 3, 7, 24)),
    LinearCase("linear, no rows", shape=(0, 24), bias=True, options=Options(reduction="sum")),
    LinearCase("linear, all ignored", ignored=1.0),
    LinearCase("linear, transposed", shape=(4, 9, 24), layout="transposed"),
]
