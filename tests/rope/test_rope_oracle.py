"""Every case of inputs.py against the reference in fp64, every pair of backends, and twice the same bits."""

import pytest
import torch

from onepass.ops.rope import kernels
from onepass.ops.rope.inputs import CASES
from onepass.testing import conformance, numerics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case: numerics.Case, fused: str, device: str, dtype: torch.dtype, seed: int) -> None:
    conformance.within_budget(case, fused, device, dtype, seed)


def test_cases_reach_every_backend(fused: str, device: str, generator: torch.Generator) -> None:
    conformance.reaches_backend(CASES, fused, device, generator)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_twice(case: numerics.Case, fused: str, device: str, generator: torch.Generator) -> None:
    conformance.same_bits_twice(case, fused, device, generator)


def test_every_backward_follows_every_forward(
    backend: str, other: str, device: str, generator: torch.Generator
) -> None:
    """The backward is the operation itself with `inverse`: another backend does it."""
    conformance.backward_follows_forward(
        CASES[:6], kernels.FORWARD, (backend, other), device, generator, is_backward=lambda *args: args[-1]
    )
