"""Every case of inputs.py on every backend against the reference in fp64: forward, backward, decode and merge."""

import pytest
import torch

from onepass.ops.attention.inputs import CASES
from onepass.testing import numerics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(
    case: numerics.Case, fused: str, dtype: torch.dtype, seed: int, request: pytest.FixtureRequest
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = case.inputs(dtype, "cpu", generator)
    if fused not in case.backends(inputs):
        pytest.skip(f"{fused} refuses this case")
    guards = {name: numerics.guarded(x) for name, x in inputs.items()}
    with numerics.nan_filled_memory():
        comparisons = numerics.compare_inputs(case, {name: guard.tensor for name, guard in guards.items()}, fused)
    numerics.assert_within_budget(comparisons, case=case, dtype=dtype, backend=fused, seed=seed)
    assert all(guard.intact() for guard in guards.values()), "an input or memory beside it was written to"


def test_cases_reach_every_backend(fused: str, generator: torch.Generator) -> None:
    """A backend that refused everything would pass the test above."""
    able = [case for case in CASES if fused in case.backends(case.inputs(torch.float32, "cpu", generator))]
    assert len(able) >= len(CASES) // 2
