"""torch.ops.onepass.norm_*: opcheck, torch.compile, autocast, and what must raise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import onepass
from onepass import nn
from onepass.ops.norm import kernels, registration
from onepass.testing import faults

_OPS = torch.ops.onepass


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def tensors(generator: torch.Generator, device: str, rows: int = 7, grad: bool = False) -> list[Tensor]:
    """x, weight, bias, residual."""
    shapes = ((2, rows, 20), (20,), (20,), (2, rows, 20))
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_opcheck_forward(backend: str, device: str, center: bool, grad: bool, generator: torch.Generator) -> None:
    x, weight, bias, residual = tensors(generator, device, grad=grad)
    for args in ((x, weight, bias, residual), (x, None, None, None), (x, weight, None, None)):
        torch.library.opcheck(_OPS.norm_fwd.default, (*args, 1e-5, 0.0, center, backend))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(backend: str, device: str, grad: bool, generator: torch.Generator) -> None:
    x, weight, bias, _ = tensors(generator, device)
    dy = torch.randn(x.shape, generator=generator).to(device)
    _, _, mean, rstd = _OPS.norm_fwd(x, weight, bias, None, 1e-5, 0.0, True, backend)
    tests = {"test_utils": ["test_schema", "test_faketensor"]} if grad else {}  # its own gradient raises, as it should
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        args = (dy, None, x.requires_grad_(grad), weight, bias, mean, rstd, 0.0, True, *needs, backend)
        torch.library.opcheck(_OPS.norm_bwd.default, args, **tests)


def test_compiles_with_at_most_two_graphs(backend: str, device: str, generator: torch.Generator) -> None:
    """Forward and backward, whole graphs, lengths that change; the same numbers as eager."""

    def step(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, total = onepass.layer_norm(x, weight, bias, residual=residual)
        return onepass.rms_norm(y, weight, offset=1.0), total

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (7, 20, 2):
        inputs = tensors(generator, device, rows, grad=True)
        with onepass.use_backend(backend):
            ours, eager = compiled(*inputs), step(*inputs)
        douts = [torch.randn(x.shape, generator=generator).to(device) for x in eager]
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, douts), torch.autograd.grad(eager, inputs, douts), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_modules_compile(backend: str, device: str, generator: torch.Generator) -> None:
    model = torch.nn.Sequential(nn.RMSNorm(20, backend=backend), nn.LayerNorm((4, 5), backend=backend)).to(device)
    model[1].register_forward_pre_hook(lambda module, args: args[0].unflatten(-1, (4, 5)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (7, 20, 2):
        x = torch.randn(2, rows, 20, generator=generator).to(device)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 2


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 7, 16, dtype=torch.bfloat16).transpose(0, 1)
        y, total = onepass.rms_norm(x, torch.empty(16), residual=torch.empty(7, 2, 16))
        assert (y.shape, y.dtype, y.is_contiguous()) == ((7, 2, 16), torch.bfloat16, True)
        assert (total.shape, total.dtype) == ((7, 2, 16), torch.float32)
        with pytest.raises(ValueError, match="weight must be"):
            onepass.rms_norm(x, torch.empty(15))


def test_second_derivatives_and_transforms_raise(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight, _, _ = tensors(generator, device, grad=True)
    y = onepass.rms_norm(x, weight, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(device), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.square().sum().backward()
    plain = x.detach()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.rms_norm"):
        torch.vmap(lambda x: onepass.rms_norm(x, backend=backend))(plain)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: onepass.rms_norm(x, backend=backend).sum())(plain)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        onepass.rms_norm(forward_ad.make_dual(plain, torch.ones_like(plain)), backend=backend)


def test_autocast_is_that_of_layer_norm(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight, bias, _ = tensors(generator, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        twin = torch.nn.functional.layer_norm(x.half(), (20,), weight, bias)
        ours = onepass.layer_norm(x.half(), weight, bias, backend=backend)
    assert ours.dtype is twin.dtype
    torch.testing.assert_close(ours, twin, rtol=1e-2, atol=1e-2)


def test_plain_calls_skip_the_dispatcher(
    backend: str, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    op = registration.forward

    def watched(*args: Any) -> Any:
        calls.append("dispatcher")
        return op(*args)

    monkeypatch.setattr(registration, "forward", watched)
    x, weight, bias, _ = tensors(generator, device)
    expected = onepass.layer_norm(x, weight, bias, backend=backend)
    assert not calls
    assert torch.equal(onepass.layer_norm(x.requires_grad_(), weight, bias, backend=backend), expected)
    assert calls


def test_use_backend_travels_into_backward(fused: str, device: str, generator: torch.Generator) -> None:
    used: list[str] = []

    def spy(launcher: Any) -> Any:
        def run(*args: Any) -> Any:
            used.append("backward")
            return launcher(*args)

        return run

    x, weight, _, _ = tensors(generator, device, grad=True)
    with faults.replaced(kernels.BACKWARD, "reference", spy):
        with onepass.use_backend("reference"):
            y = onepass.rms_norm(x, weight)
        y.sum().backward()
        assert used == ["backward"]
        onepass.rms_norm(x, weight, backend=fused).sum().backward()
    assert used == ["backward"]
