"""Every case of inputs.py against the reference in fp64, every pair of backends, and the reference against PyTorch."""

import pytest
import torch

import onepass
from onepass.ops.softmax import kernels
from onepass.ops.softmax.inputs import CASES
from onepass.testing import conformance, numerics
from onepass.testing.conformance import (  # noqa: F401
    test_cases_reach_every_backend,
    test_same_bits_twice,
    test_within_budget,
)


def test_every_backward_follows_every_forward(
    backend: str, other: str, device: str, generator: torch.Generator
) -> None:
    conformance.backward_follows_forward(CASES[:6], kernels.BACKWARD, (backend, other), device, generator)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_is_torch_softmax(case: numerics.Case, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, "cpu", generator)
    ours = case.call(inputs, "reference")
    x = inputs["x"].detach().requires_grad_()
    y = torch.softmax(x, -1)
    (dx,) = torch.autograd.grad(y, x, inputs["dy"])
    torch.testing.assert_close(ours["y"], y.detach(), equal_nan=True)
    torch.testing.assert_close(ours["dx"], dx, equal_nan=True)


def test_outputs_are_fresh_and_contiguous(backend: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(6, 5, 40, generator=generator).to(device).transpose(0, 1)[..., 3:35]
    y = onepass.softmax(x.requires_grad_(), backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).expand(y.shape))
    assert y.is_contiguous()
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
