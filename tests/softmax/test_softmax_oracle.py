"""Every case of inputs.py on every backend against the reference in fp64, and the reference against PyTorch."""

import pytest
import torch

import onepass
from onepass.core import env
from onepass.ops.softmax.inputs import CASES
from onepass.testing import numerics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case: numerics.Case, fused: str, device: str, dtype: torch.dtype, seed: int) -> None:
    if fused == "triton" and dtype is torch.bfloat16 and env.triton_interpreted():
        pytest.skip("Triton's interpreter rounds bfloat16 wrongly")
    inputs = case.inputs(dtype, device, torch.Generator().manual_seed(seed))
    guards = {name: numerics.guarded(x) for name, x in inputs.items()}
    with numerics.nan_filled_memory():
        comparisons = numerics.compare_inputs(case, {name: guard.tensor for name, guard in guards.items()}, fused)
    numerics.assert_within_budget(comparisons, case=case, dtype=dtype, backend=fused, seed=seed)
    assert all(guard.intact() for guard in guards.values()), "an input or memory beside it was written to"


def test_every_case_reaches_every_backend(fused: str, device: str, generator: torch.Generator) -> None:
    for case in CASES:
        assert fused in case.backends(case.inputs(torch.float32, device, generator))


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
