"""torch.ops.onepass.*cross_entropy*: opcheck, torch.compile, autocast, what must raise; the modules."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import onepass
from onepass import nn

_OPS = torch.ops.onepass
_OPTIONS = (-100, 0.1, 1e-2, 5.0)


def _rows(device: str, generator: torch.Generator, grad: bool = False) -> tuple[Tensor, Tensor]:
    target = torch.tensor([3, -100, 0, 16, 5])
    return torch.randn(5, 17, generator=generator).to(device).requires_grad_(grad), target.to(device)


def _linear(device: str, generator: torch.Generator, rows: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(shape, generator=generator).to(device) for shape in ((rows, 8), (17, 8), (17,)))
    target = torch.randint(17, (rows,), generator=generator).to(device)
    return x, weight, bias, target


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(backend: str, device: str, grad: bool, reduction: str, generator: torch.Generator) -> None:
    call = (*_rows(device, generator, grad), *_OPTIONS, reduction, backend)
    torch.library.opcheck(_OPS.cross_entropy_fwd.default, call)


def test_opcheck_backward(backend: str, device: str, generator: torch.Generator) -> None:
    logits, target = _rows(device, generator)
    lse = logits.logsumexp(-1)
    dloss, dlse = (torch.randn(5, generator=generator).to(device) for _ in range(2))
    for first, second in ((dloss, dlse), (dloss[0].expand(5), None)):
        call = (first, second, logits, target, lse, *_OPTIONS, backend)
        torch.library.opcheck(_OPS.cross_entropy_bwd.default, call)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("now", [False, True])
def test_opcheck_linear(backend: str, device: str, grad: bool, now: bool, generator: torch.Generator) -> None:
    x, weight, bias, target = (x.requires_grad_(grad and x.is_floating_point()) for x in _linear(device, generator))
    call = (x, weight, bias, target, *_OPTIONS, "mean", now, grad, grad, grad, backend)
    torch.library.opcheck(_OPS.linear_cross_entropy_fwd.default, call)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_linear_backward(
    backend: str, device: str, needs: tuple[bool, bool, bool], generator: torch.Generator
) -> None:
    x, weight, bias, target = _linear(device, generator)
    lse = F.linear(x, weight, bias).logsumexp(-1)
    dloss = torch.randn(5, generator=generator).to(device)
    call = (dloss, None, x, weight, bias, target, lse, *_OPTIONS, *needs, backend)
    torch.library.opcheck(_OPS.linear_cross_entropy_bwd.default, call)


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True, "softcap": 4.0}], ids=str)
def test_compiles_with_at_most_two_graphs(
    backend: str, device: str, options: dict[str, Any], generator: torch.Generator
) -> None:
    def step(logits: Tensor, target: Tensor) -> Any:
        return onepass.cross_entropy(logits, target, backend=backend, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 3, 20), (4, 7, 33), (5, 2, 300)):
        logits = torch.randn(shape, generator=generator).to(device).requires_grad_()
        target = torch.randint(shape[-1], shape[:-1], generator=generator).to(device)
        _assert_same_gradients(compiled(logits, target), step(logits, target), [logits], generator)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"reduction": "none", "return_lse": True}], ids=str)
def test_linear_compiles(backend: str, device: str, options: dict[str, Any], generator: torch.Generator) -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Any:
        return onepass.linear_cross_entropy(x, weight, target, bias=bias, backend=backend, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 9, 40):
        x, weight, bias, target = _linear(device, generator, rows)
        used = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        _assert_same_gradients(compiled(*used, target), step(*used, target), used, generator)
    assert counter.frame_count <= 2


def _assert_same_gradients(ours: Any, eager: Any, inputs: list[Tensor], generator: torch.Generator) -> None:
    ours, eager = (x if isinstance(x, tuple) else (x,) for x in (ours, eager))
    gradients = [torch.randn(x.shape, generator=generator).to(x.device) for x in eager]
    found, expected = (torch.autograd.grad(x, inputs, gradients) for x in (ours, eager))
    for a, b in zip((*ours, *found), (*eager, *expected), strict=True):
        torch.testing.assert_close(a, b)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        logits, target = torch.empty(2, 3, 50, dtype=torch.bfloat16), torch.empty(2, 3, dtype=torch.int64)
        loss, lse = onepass.cross_entropy(logits, target, return_lse=True)
        assert (loss.shape, loss.dtype, lse.shape, lse.dtype) == ((), torch.float32, (2, 3), torch.float32)
        weight = torch.empty(9, 50, dtype=torch.bfloat16)
        rows = onepass.linear_cross_entropy(logits, weight, target, reduction="none")
        assert (rows.shape, rows.dtype) == ((2, 3), torch.float32)


def test_gradients_that_nobody_needs_are_not_made(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight, bias, target = _linear(device, generator)
    call = (x, weight, bias, target, *_OPTIONS, "mean", True, False, True, False, backend)
    _, _, _, dx, dweight, dbias = _OPS.linear_cross_entropy_fwd(*call)
    assert dx.numel() == dbias.numel() == 0
    assert dweight.shape == weight.shape
    loss = onepass.linear_cross_entropy(x, weight.requires_grad_(), target, bias=bias, backend=backend)
    assert torch.autograd.grad(loss, weight)[0].shape == weight.shape


def test_what_has_no_derivative_raises(backend: str, device: str, generator: torch.Generator) -> None:
    logits, target = _rows(device, generator, grad=True)
    loss = onepass.cross_entropy(logits, target, backend=backend)
    (dlogits,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"onepass\.cross_entropy has no second derivative"):
        dlogits.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.cross_entropy is not supported"):
        torch.vmap(lambda x: onepass.cross_entropy(x, target, backend=backend))(torch.zeros(2, 5, 17, device=device))
    x, weight, bias, target = _linear(device, generator)
    loss = onepass.linear_cross_entropy(x.requires_grad_(), weight, target, bias=bias, backend=backend)
    with pytest.raises(NotImplementedError, match=r"onepass\.linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_linear_autocast_is_that_of_linear(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight, bias, target = _linear(device, generator)
    used = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = onepass.linear_cross_entropy(x, weight, target, bias=bias, backend=backend)
        twin = F.cross_entropy(F.linear(x, weight, bias), target)
        plain = onepass.cross_entropy(F.linear(x, weight, bias), target, backend=backend)
    assert loss.dtype is plain.dtype is torch.float32
    torch.testing.assert_close(loss, twin.float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(loss, plain)
    assert all(gradient.dtype is torch.float32 for gradient in torch.autograd.grad(loss, used))


def test_loss_module_is_that_of_torch(backend: str, device: str, generator: torch.Generator) -> None:
    logits, target = _rows(device, generator)
    for options in ({}, {"ignore_index": 3}, {"reduction": "sum", "label_smoothing": 0.2}, {"reduction": "none"}):
        ours, twin = nn.CrossEntropyLoss(**options, backend=backend), torch.nn.CrossEntropyLoss(**options)
        given = target.clamp(min=0) if "ignore_index" in options else target
        torch.testing.assert_close(ours(logits, given), twin(logits, given))
        assert ours.state_dict() == twin.state_dict() == {}
    loss, lse = nn.CrossEntropyLoss(z_loss=0.1, return_lse=True, backend=backend)(logits, target)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    counted = target != -100
    expected = F.cross_entropy(logits, target) + 0.1 * lse[counted].square().mean()
    torch.testing.assert_close(loss, expected)
    assert "ignore_index=-100, label_smoothing=0.0" in repr(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="weight: class weights are not supported"):
        nn.CrossEntropyLoss(torch.ones(17))
    for option in ("size_average", "reduce"):
        with pytest.raises(ValueError, match="use reduction="):
            nn.CrossEntropyLoss(**{option: True})


@pytest.mark.parametrize("bias", [False, True])
def test_linear_module_is_a_linear_layer_and_the_loss(
    bias: bool, backend: str, device: str, generator: torch.Generator
) -> None:
    x, _, _, target = _linear(device, generator)
    head = torch.nn.Linear(8, 17, bias=bias, device=device)
    ours = nn.LinearCrossEntropyLoss(8, 17, bias=bias, label_smoothing=0.1, backend=backend, device=device)
    ours.load_state_dict(head.state_dict())
    expected = F.cross_entropy(head(x), target, label_smoothing=0.1)
    torch.testing.assert_close(ours(x, target), expected)
    assert len(list(ours.parameters())) == 1 + bias
    assert "in_features=8, num_classes=17" in repr(ours)
    low = nn.LinearCrossEntropyLoss(8, 17, low_memory=True, dtype=torch.bfloat16)
    assert low.weight.dtype is torch.bfloat16
