"""The error budget, and a run of any operation against it.

    err(kernel) <= 2 * err(reference in the kernel's dtype) + 2 * eps * max|oracle| + 2 * eps32 * terms

on the largest and on the root mean square error (there with the oracle's root mean square); nonfinite values exactly
where the oracle, the reference in fp64, has them. The budget comes from the data: it grows where a problem is hard.
`terms` is the size of what an element is summed from. It matters where that cancels, as in the gradient of a softmax
over one key: the true result is 0, the reference may hit it exactly, and fp32 sums cannot do better than the terms'
rounding.

Each operation's inputs.py lists `CASES`, which look like `Case` below.
"""

import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import onepass.ops
from onepass.core import torch_compat

_EPS32 = torch.finfo(torch.float32).eps


class Case(Protocol):
    """One problem of one operation, as its inputs.py lists them."""

    @property
    def name(self) -> str: ...

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors by name."""

    def call(self, inputs: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Outputs and gradients by name."""

    def terms(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """The size of the terms that each output or gradient sums; 0 where it is not named."""

    def backends(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """The backends whose kernels can do the case."""


@dataclass(frozen=True)
class Comparison:
    """One tensor against the oracle; errors and budgets are (largest, root mean square)."""

    tensor: str
    error: tuple[float, float]
    reference_error: tuple[float, float]
    budget: tuple[float, float]
    nonfinite: int  # elements that are nonfinite in one and not, or differently, in the other
    worst_index: tuple[int, ...]
    actual_there: float
    oracle_there: float

    @property
    def units(self) -> float:
        """The larger error in units of its budget: at most 1 passes."""
        if self.nonfinite:
            return math.inf
        return max(_ratio(error, budget) for error, budget in zip(self.error, self.budget, strict=True))

    @property
    def ok(self) -> bool:
        return self.units <= 1

    def __str__(self) -> str:
        lines = [
            f"{self.tensor}: {self.units:.3g} budgets"
            + (f", {self.nonfinite} elements are nonfinite on one side only" if self.nonfinite else "")
        ]
        for kind, error, reference, budget in zip(
            ("max", "rms"), self.error, self.reference_error, self.budget, strict=True
        ):
            lines.append(f"  {kind}: error {error:.3e}, reference's {reference:.3e}, budget {budget:.3e}")
        lines.append(f"  worst at {self.worst_index}: {self.actual_there!r}, exact {self.oracle_there!r}")
        return "\n".join(lines)


def _ratio(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return error / budget if budget > 0 else math.inf


def compare(tensor: str, actual: Tensor, oracle: Tensor, reference: Tensor, terms: float = 0.0) -> Comparison:
    """`actual` against the fp64 `oracle`; `reference` is plain PyTorch in actual's dtype, `terms` see above."""
    if actual.shape != oracle.shape or reference.shape != oracle.shape:
        raise AssertionError(f"{tensor}: shapes {actual.shape}, oracle {oracle.shape}, reference {reference.shape}")
    exact = oracle.detach().double().cpu()
    ours, plain = actual.detach().double().cpu(), reference.detach().double().cpu()
    finite = torch.isfinite(exact)
    same = finite & torch.isfinite(ours) | (ours == exact) | (torch.isnan(ours) & torch.isnan(exact))
    difference = torch.where(finite & torch.isfinite(ours), ours - exact, 0.0).abs()
    plain_difference = torch.where(finite & torch.isfinite(plain), plain - exact, 0.0).abs()
    size = _largest_and_rms(torch.where(finite, exact, 0.0))
    error, reference_error = _largest_and_rms(difference), _largest_and_rms(plain_difference)
    eps = torch.finfo(actual.dtype).eps
    budget = tuple(2 * r + 2 * eps * s + 2 * _EPS32 * terms for r, s in zip(reference_error, size, strict=True))
    worst = _worst_index(difference, same)
    return Comparison(
        tensor,
        error,
        reference_error,
        (budget[0], budget[1]),
        int((~same).sum()),
        worst,
        float(ours[worst]) if ours.numel() else math.nan,
        float(exact[worst]) if exact.numel() else math.nan,
    )


def _largest_and_rms(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        return 0.0, 0.0
    return float(x.abs().max()), float(x.square().mean().sqrt())


def _worst_index(difference: Tensor, same: Tensor) -> tuple[int, ...]:
    if difference.numel() == 0:
        return ()
    flat = int(torch.where(same, difference, torch.inf).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))


def error_in_budgets(actual: Tensor, oracle: Tensor, reference: Tensor, terms: float = 0.0) -> float:
    """The error of `actual` in units of its budget; see `compare`."""
    return compare("", actual, oracle, reference, terms).units


def compare_case(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator, backend: str
) -> list[Comparison]:
    """Every output and gradient of one case on one backend against the oracle."""
    inputs = case.inputs(dtype, device, generator)
    return compare_inputs(case, inputs, backend)


def compare_inputs(case: Case, inputs: Mapping[str, Tensor], backend: str) -> list[Comparison]:
    """The same for inputs that were drawn before."""
    oracle = case.call(in_double(inputs), "reference")
    reference = case.call(inputs, "reference")
    actual = case.call(inputs, backend)
    terms = case.terms(inputs)
    return [compare(name, actual[name], oracle[name], reference[name], terms.get(name, 0.0)) for name in oracle]


def assert_within_budget(comparisons: Sequence[Comparison], **context: Any) -> None:
    """AssertionError with the whole story (tensors, errors, budgets, worst index, the context given) if one fails."""
    failed = [comparison for comparison in comparisons if not comparison.ok]
    if failed:
        story = "\n".join(str(comparison) for comparison in failed)
        raise AssertionError(story + "\n" + "\n".join(f"{name}: {value}" for name, value in context.items()))


def in_double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in fp64 where they are q's kind; options that are fp32 by definition stay so."""
    kept = ("alibi_slopes", "k_descale", "v_descale", "k_scale_shift", "v_scale_shift")
    return {
        name: x.detach().double() if x.dtype.is_floating_point and name not in kept else x for name, x in inputs.items()
    }


def cases() -> Iterator[tuple[str, Case]]:
    """(operation, case) of every operation that has an inputs.py: what `onepass check` runs."""
    for module in pkgutil.iter_modules(onepass.ops.__path__, "onepass.ops."):
        if module.ispkg and importlib.util.find_spec(f"{module.name}.inputs") is not None:
            for case in importlib.import_module(f"{module.name}.inputs").CASES:
                yield module.name.rpartition(".")[2], case


# Inputs that show a read or write outside, and outputs that show what was not written.


@dataclass(frozen=True)
class Guarded:
    """A copy of a tensor, in the same strides, between bands of NaN (of a pattern, where there is no NaN)."""

    tensor: Tensor
    buffer: Tensor
    before: Tensor

    def intact(self) -> bool:
        """Neither the bands nor the tensor itself have changed."""
        return torch.equal(self.buffer.view(torch.uint8), self.before.view(torch.uint8))


BANDS = (64, 67)  # elements; behind the first a tensor begins as allocated ones do, behind the other anywhere


def guarded(x: Tensor, band: int = BANDS[1]) -> Guarded:
    """`x` copied into a larger buffer with `band` elements of NaN before, behind and in any gaps of its strides."""
    strides = x.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) if x.numel() else 0
    buffer = torch.empty(span + 2 * band, dtype=x.dtype, device=x.device)
    buffer.fill_(math.nan if x.dtype.is_floating_point else 1)
    inner = buffer.as_strided(x.shape, strides, band)
    overwrite(inner, x)
    return Guarded(inner, buffer, buffer.clone())


def overwrite(target: Tensor, x: Tensor) -> None:
    """x's numbers into a tensor of the same strides; expanded dimensions hold one element, which is written once."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
    target[once].copy_(x[once])


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Inside, torch.empty gives NaN: an output element that a kernel does not write shows."""
    deterministic, filling = torch.are_deterministic_algorithms_enabled(), torch_compat.fills_memory()
    torch.use_deterministic_algorithms(True)
    torch_compat.fill_memory(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch_compat.fill_memory(filling)
