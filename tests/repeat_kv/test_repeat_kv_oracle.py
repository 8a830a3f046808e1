"""Every case of inputs.py against the reference in fp64, every pair of backends, and twice the same bits."""

from typing import Any

import pytest
import torch

from onepass.ops.repeat_kv import kernels
from onepass.ops.repeat_kv.inputs import CASES
from onepass.testing import faults, numerics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case: numerics.Case, fused: str, dtype: torch.dtype, seed: int) -> None:
    inputs = case.inputs(dtype, "cpu", torch.Generator().manual_seed(seed))
    if fused not in case.backends(inputs):
        pytest.skip(f"{fused} refuses this case")
    guards = {name: numerics.guarded(x) for name, x in inputs.items()}
    with numerics.nan_filled_memory():
        comparisons = numerics.compare_inputs(case, {name: guard.tensor for name, guard in guards.items()}, fused)
    numerics.assert_within_budget(comparisons, case=case, dtype=dtype, backend=fused, seed=seed)
    assert all(guard.intact() for guard in guards.values()), "an input or memory beside it was written to"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget_on_the_gpu(case: numerics.Case, dtype: torch.dtype, seed: int) -> None:
    inputs = case.inputs(dtype, "cuda", torch.Generator().manual_seed(seed))
    backends = [backend for backend in case.backends(inputs) if backend != "reference"]
    assert backends
    for backend in backends:
        with numerics.nan_filled_memory():
            comparisons = numerics.compare_inputs(case, inputs, backend)
        numerics.assert_within_budget(comparisons, case=case, dtype=dtype, backend=backend, seed=seed)


def test_cases_reach_every_backend(fused: str, generator: torch.Generator) -> None:
    """A backend that refused everything would pass the test above."""
    able = [case for case in CASES if fused in case.backends(case.inputs(torch.float32, "cpu", generator))]
    assert len(able) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_twice(case: numerics.Case, fused: str, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float32, "cpu", generator)
    if fused not in case.backends(inputs):
        pytest.skip(f"{fused} refuses this case")
    first, second = case.call(inputs, fused), case.call(inputs, fused)
    for name, x in first.items():
        assert torch.equal(x.view(torch.uint8), second[name].view(torch.uint8)), name
        assert x.is_contiguous(), name


@pytest.mark.parametrize("other", kernels.BACKWARD.usable)
def test_every_backward_follows_every_forward(backend: str, other: str, generator: torch.Generator) -> None:
    def swapped(launcher: Any) -> Any:
        backward = next(kernel for kernel in kernels.BACKWARD.kernels if kernel.backend == other).load()
        return lambda *args: (launcher if args[0].dtype is torch.float64 else backward)(*args)  # fp64: the oracle

    for case in CASES[:6]:
        inputs = case.inputs(torch.float32, "cpu", generator)
        with faults.replaced(kernels.BACKWARD, backend, swapped):
            numerics.assert_within_budget(
                numerics.compare_inputs(case, inputs, backend), case=case, forward=backend, backward=other
            )
