"""Every case of inputs.py on every backend against the reference in fp64: forward, backward, decode and merge."""

import pytest
import torch

from onepass.ops.attention.inputs import CASES
from onepass.testing import conformance, numerics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case: numerics.Case, fused: str, device: str, dtype: torch.dtype, seed: int) -> None:
    conformance.within_budget(case, fused, device, dtype, seed)


def test_cases_reach_every_backend(fused: str, device: str, generator: torch.Generator) -> None:
    conformance.reaches_backend(CASES, fused, device, generator, share=0.5)
