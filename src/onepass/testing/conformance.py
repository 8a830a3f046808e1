"""Tests that every operation passes. Where a test file imports one that starts with `test_`, it runs with that file's
`CASES`; the others are called with cases and tables. testing/parametrize.py fills `case`, `backend`, `fused`, `other`
and `dtype`; `device` is where those work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.core import env
from onepass.core.registry import KernelTable, Launcher
from onepass.testing import faults, numerics


def test_within_budget(case: numerics.Case, fused: str, device: str, dtype: torch.dtype, seed: int) -> None:
    """Outputs and gradients against the oracle; outputs start as NaN, inputs lie between bands that must survive, one
    of BANDS by the seed.
    """
    inputs = case.inputs(dtype, device, torch.Generator().manual_seed(seed))
    if fused not in case.backends(inputs):
        pytest.skip(f"{fused} refuses this case")
    if env.triton_interpreted() and dtype is not torch.float32 and _takes_long(inputs):
        pytest.skip("Triton's interpreter takes long, and has done this case in float32")
    band = numerics.BANDS[seed % 2]
    guards = {name: numerics.guarded(x, band) for name, x in inputs.items()}
    with numerics.nan_filled_memory():
        comparisons = numerics.compare_inputs(case, {name: guard.tensor for name, guard in guards.items()}, fused)
    numerics.assert_within_budget(comparisons, case=case, dtype=dtype, backend=fused, device=device, seed=seed)
    assert all(guard.intact() for guard in guards.values()), "an input or memory beside it was written to"


def _takes_long(inputs: dict[str, Tensor]) -> bool:
    """In Triton's interpreter: many columns, or many programs."""
    return any(x.numel() > 100_000 or x.numel() > 10_000 * x.shape[-1] for x in inputs.values() if x.dim() > 1)


def reaches_backend(
    cases: Sequence[numerics.Case], backend: str, device: str, generator: torch.Generator, share: float = 1.0
) -> None:
    """The backend does that share of the cases: one that refused everything would pass every other test."""
    able = [case for case in cases if backend in case.backends(case.inputs(torch.float32, device, generator))]
    assert len(able) >= share * len(cases)


def test_cases_reach_every_backend(
    request: pytest.FixtureRequest, fused: str, device: str, generator: torch.Generator
) -> None:
    reaches_backend(request.module.CASES, fused, device, generator)


def test_same_bits_twice(case: numerics.Case, fused: str, device: str, generator: torch.Generator) -> None:
    """Outputs and gradients, which are contiguous too."""
    if env.triton_interpreted():
        pytest.skip("Triton's interpreter runs one program after the other")
    inputs = case.inputs(torch.float32, device, generator)
    if fused not in case.backends(inputs):
        pytest.skip(f"{fused} refuses this case")
    first, second = case.call(inputs, fused), case.call(inputs, fused)
    for name, x in first.items():
        assert same_bits(x, second[name]), name
        assert x.is_contiguous(), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    """torch.equal, where NaN equals NaN and 0 is not -0."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _is_any_call(*args: Any) -> bool:
    return True


def backward_follows_forward(
    cases: Sequence[numerics.Case],
    table: KernelTable,
    backends: tuple[str, str],
    device: str,
    generator: torch.Generator,
    is_backward: Callable[..., bool] = _is_any_call,
) -> None:
    """The forward of one backend, then the backward of the other: what is saved means the same on both.

    is_backward: tells a launcher's arguments, where `table` serves both directions.
    """
    forward, backward = backends
    other = next(kernel for kernel in table.kernels if kernel.backend == backward).load()

    def swapped(launcher: Launcher) -> Launcher:
        def run(*args: Any) -> Any:
            oracle = args[0].dtype is torch.float64  # it keeps its own
            return (other if is_backward(*args) and not oracle else launcher)(*args)

        return run

    for case in cases:
        inputs = case.inputs(torch.float32, device, generator)
        with faults.replaced(table, forward, swapped):
            numerics.assert_within_budget(
                numerics.compare_inputs(case, inputs, forward), case=case, forward=forward, backward=backward
            )


def fault_is_noticed(
    case: numerics.Case,
    inputs: dict[str, Tensor],
    backend: str,
    table: KernelTable,
    fault: Callable[[Launcher], Launcher],
    notice: tuple[type[Exception] | tuple[type[Exception], ...], str] = (AssertionError, "budgets"),
) -> None:
    """The case passes, and fails once the fault is planted in the backend's launcher."""
    numerics.assert_within_budget(numerics.compare_inputs(case, inputs, backend))
    with faults.replaced(table, backend, fault), pytest.raises(notice[0], match=notice[1]):
        numerics.assert_within_budget(numerics.compare_inputs(case, inputs, backend))
