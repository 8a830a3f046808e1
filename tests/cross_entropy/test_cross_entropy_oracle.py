"""Every case of inputs.py on every backend against the reference in fp64, and the reference against PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass.ops.cross_entropy.inputs import CASES, CrossEntropyCase, LinearCase, Options
from onepass.testing.conformance import (  # noqa: F401
    test_cases_reach_every_backend,
    test_same_bits_twice,
    test_within_budget,
)


def _by_torch(logits: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    x = options.softcap * torch.tanh(logits / options.softcap) if options.softcap else logits
    lse = torch.logsumexp(x, -1)
    plain = F.cross_entropy(
        x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0),
        target.reshape(-1),
        label_smoothing=options.label_smoothing,
        reduction="none",
    ).view(target.shape)
    rows = plain + torch.where(target == -100, 0.0, options.z_loss * lse.square())
    if options.reduction == "none":
        return rows, lse
    return (rows.sum() if options.reduction == "sum" else rows.sum() / (target != -100).sum()), lse


_FINITE = [case for case in CASES if "inf" not in case.name]


@pytest.mark.parametrize("case", _FINITE, ids=lambda case: case.name)
def test_reference_is_torch(case: Any, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, "cpu", generator)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    ours = case.call(inputs, "reference")
    names = [name for name in ("logits", "x", "weight", "bias") if name in inputs]
    used = {name: inputs[name].detach().requires_grad_() for name in names}
    logits = used["logits"] if "logits" in used else F.linear(used["x"], used["weight"], used.get("bias"))
    results = _by_torch(logits, inputs["target"], case.options)[: 1 + case.options.return_lse]
    gradients = torch.autograd.grad(
        results, list(used.values()), [inputs[x] for x in ("dloss", "dlse")[: len(results)]]
    )
    for name, theirs in zip(("loss", "lse"), results, strict=False):
        torch.testing.assert_close(ours[name], theirs.detach(), equal_nan=True)
    for name, theirs in zip(names, gradients, strict=True):
        if case.ignored < 1:  # where no row counts, ours are 0 and PyTorch's may be NaN
            torch.testing.assert_close(ours[f"d{name}"], theirs)


def test_nonfinite_rows_are_those_of_torch(generator: torch.Generator) -> None:
    case = next(case for case in CASES if isinstance(case, CrossEntropyCase) and case.poisoned)
    inputs = case.inputs(torch.float64, "cpu", generator)
    loss = case.call(inputs, "reference")["loss"]
    theirs = F.cross_entropy(inputs["logits"], inputs["target"], reduction="none")
    assert torch.equal(loss.isnan(), theirs.isnan())
    assert 0 < int(theirs.isnan().sum()) < len(theirs)


def test_every_backward_follows_every_forward(
    backend: str, other: str, device: str, generator: torch.Generator
) -> None:
    logits = torch.randn(5, 300, generator=generator).to(device)
    target = torch.tensor([1, -100, 299, 0, 7], device=device)
    options = (-100, 0.1, 1e-2, 5.0)
    _, lse, _ = torch.ops.onepass.cross_entropy_fwd(logits, target, *options, "none", backend)
    dloss, dlse = (torch.randn(5, generator=generator).to(device) for _ in range(2))
    ours, plain = (
        torch.ops.onepass.cross_entropy_bwd(dloss, dlse, logits, target, lse, *options, name)
        for name in (other, "reference")
    )
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_linear_is_cross_entropy_of_the_logits(backend: str, device: str, generator: torch.Generator) -> None:
    case = LinearCase("", bias=True)
    inputs = case.inputs(torch.float32, device, generator)
    logits = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    expected = onepass.cross_entropy(logits, inputs["target"], backend=backend)
    torch.testing.assert_close(case.call(inputs, backend)["loss"], expected)
