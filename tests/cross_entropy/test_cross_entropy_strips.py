"""linear_cross_entropy in many strips: the numbers stay, the memory does not grow with the logits."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.core import env
from onepass.ops.cross_entropy import kernels, linear, linear_plan
from onepass.ops.cross_entropy.carry import empty_lower
from onepass.ops.cross_entropy.inputs import LinearCase, Options
from onepass.testing import memory, numerics

_EVERY = Options(label_smoothing=0.1, z_loss=1e-3, softcap=5.0)


_PAIR_BYTES = 240_000  # two strips of 700 rows of 300 bf16 logits


@pytest.fixture(params=[(3, 0), (4, 0), (3, _PAIR_BYTES)], ids=["24-bit carry", "32-bit carry", "20-bit carry"])
def small_strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """128 rows or classes to a strip; the list collects how many strips there were."""
    counts: list[int] = []

    cut_up = linear_plan.strips

    def strips(*args: Any) -> Any:
        parts = cut_up(*args)
        counts.append(len(parts))
        return parts

    cut = linear_plan.LinearPlan(1, request.param[1], 1, 1, 128, request.param[0])
    monkeypatch.setattr(linear, "plan", lambda device: cut)
    monkeypatch.setattr(linear, "strips", strips)
    monkeypatch.setattr(linear_plan, "strips", strips)
    return counts


@pytest.mark.parametrize(
    "case",
    [
        LinearCase("now", (700, 24), 300, bias=True, options=_EVERY),
        LinearCase("now, fp32 weight", (700, 24), 300, bias=True, weight_dtype=torch.float32),
        LinearCase("low memory", (300, 24), 700, bias=True, low_memory=True, options=_EVERY),
        LinearCase("none", (300, 24), 700, bias=True, options=dataclasses.replace(_EVERY, reduction="none")),
        LinearCase("lse", (300, 24), 700, options=dataclasses.replace(_EVERY, return_lse=True)),
    ],
    ids=lambda case: case.name,
)
def test_strips_are_within_budget(
    request: pytest.FixtureRequest,
    case: LinearCase,
    small_strips: list[int],
    fused: str,
    device: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if env.triton_interpreted() and dtype is torch.float32 and "24-bit" not in request.node.name:
        pytest.skip("fp32 weights carry nothing, so Triton's interpreter, which takes long, does them once")
    inputs = case.inputs(dtype, device, torch.Generator().manual_seed(seed))
    with numerics.nan_filled_memory():
        comparisons = numerics.compare_inputs(case, inputs, fused)
    numerics.assert_within_budget(comparisons, case=case, dtype=dtype, backend=fused, seed=seed)
    assert max(small_strips) >= 3


def test_weight_gradient_is_carried_in_fp32(small_strips: list[int], generator: torch.Generator) -> None:
    """Each of 64 strips adds less than a bf16 sum of that size would notice."""
    x = torch.ones(64 * 128, 1, dtype=torch.bfloat16)
    x[:128] = 256.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(len(x), dtype=torch.int64)
    loss = onepass.linear_cross_entropy(x, weight, target, reduction="sum", backend="reference")
    (dweight,) = torch.autograd.grad(loss, weight)
    assert small_strips[0] == 64
    exact = 0.5 * x.double().sum()
    assert dweight.flatten().tolist() == [float((-exact).bfloat16()), float(exact.bfloat16())]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_carry_adds_in_fp32(bits: int, backend: str, device: str, generator: torch.Generator) -> None:
    carry = next(kernel for kernel in kernels.CARRY.kernels if kernel.backend == backend).load()
    terms = torch.randn(3, 5, 700, generator=generator).to(device)
    terms[0, 0, :3] = torch.tensor([torch.inf, torch.nan, -0.0])
    result = torch.empty(5, 700, dtype=torch.float16, device=device)
    lower = empty_lower(result, bits)
    for step in range(3):
        carry(terms[step].clone(), lower, result, step == 0, step == 2)
    exact = terms[0] + terms[1] + terms[2]
    if bits == 16:
        torch.testing.assert_close(result, exact.half(), rtol=0, atol=0, equal_nan=True)
    else:  # two roundings to 16 or 12 bits of mantissa, then the result's own to 11
        own = 2.0**-11
        carried = 2.0**-15 if bits == 8 else 2.0**-12
        torch.testing.assert_close(result.float(), exact, rtol=own, atol=own / 4 + 8 * carried, equal_nan=True)


def test_strips_cover_everything_once() -> None:
    for total in (0, 1, 127, 128, 129, 1000, 8192):
        parts = linear_plan.strips(total, 10, 5000, 128)
        assert [i for start, end in parts for i in range(start, end)] == list(range(total))
        assert all(start % 128 == 0 for start, _ in parts)
        assert all((end - start) * 10 <= max(5000, 1280) for start, end in parts)


@pytest.mark.slow
@pytest.mark.parametrize(("low_memory", "reduction"), [(False, "mean"), (True, "mean"), (False, "none")])
def test_never_holds_all_logits(low_memory: bool, reduction: str) -> None:
    """600 MB of logits; what is held is a few strips of them."""
    rows, classes = 4096, 36864

    def step(rows: int, classes: int) -> Tensor:
        x, weight = (torch.randn(n, 4, requires_grad=True) for n in (rows, classes))
        target = torch.randint(classes, (rows,))
        loss = onepass.linear_cross_entropy(x, weight, target, low_memory=low_memory, reduction=reduction)
        loss.sum().backward()
        return loss

    step(128, 256)
    try:
        held = memory.peak_bytes(lambda: step(rows, classes))
    except RuntimeError as error:
        pytest.skip(str(error))
    # The reference makes several copies of a strip; a kernel makes none.
    assert held < rows * classes * 4 * 0.75


def test_gradients_may_be_asked_for_again(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight = (torch.randn(n, 8, generator=generator).to(device).requires_grad_() for n in (9, 20))
    target = torch.arange(9, device=device)
    loss = onepass.linear_cross_entropy(x, weight, target, backend=backend)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0, device=device), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight), torch.tensor(6.0, device=device))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def _small(device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (torch.randn(n, 8, generator=generator).to(device).requires_grad_() for n in (9, 20))
    return x, weight, torch.arange(9, device=device)


def test_gradients_that_others_hold_are_not_scaled_in_place(
    backend: str, device: str, generator: torch.Generator
) -> None:
    x, weight, target = _small(device, generator)
    options = (-100, 0.0, 0.0, 0.0, "mean", True, True, True, False, backend)
    loss, _, _, dx, dweight, _ = torch.ops.onepass.linear_cross_entropy_fwd(x, weight, None, target, *options)
    before = dx.clone(), dweight.clone()
    (3 * loss).backward()
    assert torch.equal(dx, before[0])
    assert torch.equal(dweight, before[1])
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append((saved, saved.clone()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = onepass.linear_cross_entropy(x, weight, target, backend=backend)
    (3 * loss).backward()
    assert kept
    assert all(torch.equal(saved, copy) for saved, copy in kept)
