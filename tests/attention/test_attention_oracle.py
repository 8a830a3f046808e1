"""Every case of inputs.py on every backend against the reference in fp64: forward, backward, decode and merge."""

import torch

from onepass.ops.attention.inputs import CASES
from onepass.testing import conformance
from onepass.testing.conformance import test_within_budget  # noqa: F401


def test_cases_reach_every_backend(fused: str, device: str, generator: torch.Generator) -> None:
    conformance.reaches_backend(CASES, fused, device, generator, share=0.5)
