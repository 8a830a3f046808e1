"""Every case of inputs.py against the reference in fp64, every pair of backends, and twice the same bits."""

import torch

from onepass.ops.norm import kernels
from onepass.ops.norm.inputs import CASES
from onepass.testing import conformance
from onepass.testing.conformance import (  # noqa: F401
    test_cases_reach_every_backend,
    test_same_bits_twice,
    test_within_budget,
)


def test_every_backward_follows_every_forward(
    backend: str, other: str, device: str, generator: torch.Generator
) -> None:
    conformance.backward_follows_forward(CASES[:6], kernels.BACKWARD, (backend, other), device, generator)
