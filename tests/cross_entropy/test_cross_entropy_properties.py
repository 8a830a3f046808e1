"""What must be equal to the bit, rows that must not see their neighbours, targets, and ignored rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.core import env

_OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}


def _both(logits: Tensor, target: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = onepass.cross_entropy(logits, target, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("shape", [(40, 30), (7, 300), (3, 20000)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_twice_the_same_bits(
    shape: tuple[int, int], reduction: str, fused: str, device: str, generator: torch.Generator
) -> None:
    logits = torch.randn(shape, generator=generator).to(device)
    target = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    first, second = (_both(logits, target, fused, reduction=reduction, **_OPTIONS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("low_memory", [False, True])
def test_linear_twice_the_same_bits(low_memory: bool, fused: str, device: str, generator: torch.Generator) -> None:
    x, weight = (torch.randn(n, 16, generator=generator).to(device).requires_grad_() for n in (40, 300))
    target = torch.randint(300, (40,), generator=generator).to(device)
    found = []
    for _ in range(2):
        loss = onepass.linear_cross_entropy(x, weight, target, low_memory=low_memory, backend=fused)
        found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("classes", [5, 300, 20000])
def test_a_row_alone_is_the_row_among_others(classes: int, fused: str, device: str, generator: torch.Generator) -> None:
    logits = torch.randn(9, classes, generator=generator).to(device)
    logits[3] = torch.nan
    logits[5, 2] = torch.inf
    target = torch.randint(classes, (9,), generator=generator).to(device)
    among = _both(logits, target, fused, reduction="none", **_OPTIONS)
    alone = _both(logits[4:5], target[4:5], fused, reduction="none", **_OPTIONS)
    for a, b in zip(among, alone, strict=True):
        assert torch.equal(a[4:5], b)
        assert a[3].isnan().all()
        assert a[[0, 1, 2, 4, 6, 7, 8]].isfinite().all()


def test_ignored_rows_receive_nothing_whatever_they_hold(fused: str, device: str) -> None:
    logits = torch.zeros(4, 3000, device=device)
    logits[1], logits[2] = torch.nan, torch.inf
    target = torch.tensor([5, -1, -1, 2999], device=device)
    loss, dlogits = _both(logits, target, fused, ignore_index=-1)
    torch.testing.assert_close(loss, torch.tensor(3000.0, device=device).log())
    assert not dlogits[1:3].any()
    rows, _ = _both(logits, target, fused, ignore_index=-1, reduction="none")
    assert not rows[1:3].any()
    inside, _ = _both(torch.zeros(2, 7, device=device), torch.tensor([3, 4], device=device), fused, ignore_index=3)
    torch.testing.assert_close(inside, torch.tensor(7.0, device=device).log())  # ignore_index may be a class


@pytest.mark.parametrize("linear", [False, True])
def test_all_ignored(linear: bool, fused: str, device: str) -> None:
    """The mean is NaN, as in PyTorch; the gradient is 0."""
    x, target = torch.ones(3, 5, device=device, requires_grad=True), torch.full((3,), -100, device=device)
    weight = torch.ones(9, 5, device=device, requires_grad=True)
    if linear:
        loss = onepass.linear_cross_entropy(x, weight, target, backend=fused)
        gradients = torch.autograd.grad(loss, (x, weight))
    else:
        loss = onepass.cross_entropy(x, target, backend=fused)
        gradients = torch.autograd.grad(loss, (x,))
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients)


def test_targets_that_are_no_class_are_found_on_the_cpu(backend: str, device: str) -> None:
    logits = torch.zeros(4, 7, device=device)
    for wrong in (7, -1, 2**40):
        target = torch.tensor([1, -100, wrong, 3], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=rf"0 to 6, or ignore_index -100; element 2 .* is {wrong}"):
                onepass.cross_entropy(logits, target, backend=backend)
            with pytest.raises(IndexError, match=f"is {wrong}"):
                onepass.linear_cross_entropy(torch.zeros(4, 2), torch.zeros(7, 2), target, backend=backend)
        else:
            loss, dlogits = _both(logits, target, backend, reduction="none")
            assert loss.isnan().tolist() == dlogits.isnan().all(-1).tolist() == [False, False, True, False]
            assert dlogits[:2].isfinite().all()


@pytest.mark.parametrize("wrong", [7, -1, 2**40])
def test_launchers_give_nan_for_targets_that_are_no_class(wrong: int, fused: str, device: str) -> None:
    """What a GPU gives, where nobody looks at the targets first."""
    from onepass.ops.cross_entropy import kernels

    forward, backward = (
        next(kernel for kernel in table.kernels if kernel.backend == fused).load()
        for table in (kernels.FORWARD, kernels.BACKWARD)
    )
    if fused == "cpu":
        pytest.skip("its targets have been looked at")
    logits, target = torch.zeros(3, 7, device=device), torch.tensor([1, wrong, -100], device=device)
    loss, lse = forward(logits, target, -100, 0.0, 0.0, 0.0)
    assert loss.isnan().tolist() == [False, True, False]
    dlogits = backward(torch.ones(3, device=device), None, logits, target, lse, -100, 0.0, 0.0, 0.0)
    assert dlogits.isnan().all(-1).tolist() == [False, True, False]
    assert dlogits[[0, 2]].isfinite().all()


def test_columns_of_a_wider_row(fused: str, device: str, generator: torch.Generator) -> None:
    """Strips of classes: what the backward makes of some columns is what it makes of all, and in place."""
    from onepass.ops.cross_entropy import kernels

    backward = next(kernel for kernel in kernels.BACKWARD.kernels if kernel.backend == fused).load()
    logits = torch.randn(5, 300, generator=generator).to(device)
    target = torch.tensor([0, 99, 100, -100, 299], device=device)
    lse = (5.0 * torch.tanh(logits / 5.0)).logsumexp(-1)
    dloss, dlse = (torch.randn(5, generator=generator).to(device) for _ in range(2))
    rest = (target, lse, -100, 0.1, 1e-2, 5.0)
    for given in (dlse, None):
        whole = backward(dloss, given, logits, *rest)
        part = logits[:, 100:200].contiguous()
        result = backward(dloss, given, part, *rest, 100, 300, part)
        assert result.data_ptr() == part.data_ptr()
        torch.testing.assert_close(part, whole[:, 100:200], atol=1e-7, rtol=1e-6)


def test_widest_row(fused: str, device: str, generator: torch.Generator) -> None:
    logits = torch.randn(1, 262144, generator=generator).to(device)
    loss, dlogits = _both(logits, torch.tensor([262143], device=device), fused)
    theirs = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(theirs, torch.tensor([262143], device=device))
    torch.testing.assert_close(loss, expected.detach().float())
    torch.testing.assert_close(dlogits, torch.autograd.grad(expected, theirs)[0].float(), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("low_memory", [False, True])
def test_linear_over_the_most_classes(low_memory: bool, fused: str, device: str, generator: torch.Generator) -> None:
    x, weight = (torch.randn(n, 4, generator=generator).to(device).requires_grad_() for n in (2, 262144))
    target = torch.tensor([262143, 5], device=device)
    loss = onepass.linear_cross_entropy(x, weight, target, low_memory=low_memory, backend=fused)
    theirs = torch.nn.functional.cross_entropy(x @ weight.T, target)
    exact = [z.detach().double().requires_grad_() for z in (x, weight)]  # PyTorch's loss in fp32 may be 2e-6 away
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target)
    torch.testing.assert_close(loss, expected.float())
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(dweight, torch.autograd.grad(expected, exact[1])[0].float(), atol=1e-8, rtol=1e-4)
    # Here a product of fp32 sums 262144 numbers, up to 1e-3 away from theirs; PyTorch's is the same product.
    torch.testing.assert_close(dx, torch.autograd.grad(theirs, x)[0], atol=5e-5, rtol=1e-3)


def test_many_rows_reduce_in_a_fixed_order(fused: str, device: str, generator: torch.Generator) -> None:
    rows = 8000 if env.triton_interpreted() else 40000
    logits = torch.randn(rows, 2, generator=generator).to(device)
    target = torch.randint(2, (rows,), generator=generator).to(device)
    target[::3] = -100
    losses, _ = _both(logits, target, "reference", reduction="none")
    mean, _ = _both(logits, target, fused)
    torch.testing.assert_close(mean, losses.double().sum().div((target >= 0).sum()).float(), rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st() -> None:
    logits = torch.zeros(2**15 + 3, 2**16, dtype=torch.float16, device="cuda")
    logits[-1, 7] = 9.0
    target = torch.full((len(logits),), 7, device="cuda")
    loss, dlogits = _both(logits, target, "triton", reduction="none")
    alone, dalone = _both(logits[-1:], target[-1:], "reference", reduction="none")
    torch.testing.assert_close(loss[-1:], alone)
    torch.testing.assert_close(dlogits[-1:], dalone)
