"""torch.ops.onepass.softmax_*: opcheck, torch.compile, autocast, and what must raise."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import onepass
from onepass import nn
from onepass.ops.softmax import kernels
from onepass.testing import faults

_OPS = torch.ops.onepass


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend: str, device: str, grad: bool, generator: torch.Generator) -> None:
    x = torch.randn(4, 3, 17, generator=generator).to(device).requires_grad_(grad)
    torch.library.opcheck(_OPS.softmax_fwd.default, (x, backend))
    y = torch.softmax(x.detach(), -1)
    torch.library.opcheck(_OPS.softmax_bwd.default, (torch.randn(y.shape).to(device), y, backend))


def test_compiles_with_at_most_two_graphs(backend: str, device: str, generator: torch.Generator) -> None:
    def step(x: Tensor) -> Tensor:
        return onepass.softmax(x, backend=backend)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((4, 20), (7, 33), (2, 300)):
        x = torch.randn(shape, generator=generator).to(device).requires_grad_()
        dy = torch.randn(shape, generator=generator).to(device)
        ours, eager = compiled(x), step(x)
        assert torch.equal(ours, eager)
        assert torch.equal(torch.autograd.grad(ours, x, dy)[0], torch.autograd.grad(eager, x, dy)[0])
    assert counter.frame_count <= 2


def test_fake_tensors() -> None:
    with FakeTensorMode():
        y = onepass.softmax(torch.empty(2, 3, 5, dtype=torch.bfloat16).transpose(0, 1))
        assert (y.shape, y.dtype, y.is_contiguous()) == ((3, 2, 5), torch.bfloat16, True)


def test_what_has_no_derivative_raises(backend: str, device: str) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(onepass.softmax(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"onepass\.softmax has no second derivative"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.softmax is not supported"):
        torch.vmap(lambda x: onepass.softmax(x, backend=backend))(torch.zeros(2, 3, 4, device=device))


def test_autocast_is_that_of_torch_softmax(backend: str, device: str) -> None:
    x = torch.randn(3, 4, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=torch.bfloat16):
            assert onepass.softmax(x.to(dtype), backend=backend).dtype is torch.softmax(x.to(dtype), -1).dtype


def test_use_backend_travels_into_backward() -> None:
    used: list[str] = []
    x = torch.randn(3, 4, requires_grad=True)
    with faults.replaced(
        kernels.BACKWARD, "reference", lambda launcher: lambda *args: used.append("backward") or launcher(*args)
    ):
        with onepass.use_backend("reference"):
            y = onepass.softmax(x)
        y.square().sum().backward()
    assert used == ["backward"]


def test_module_is_that_of_torch(backend: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(3, 4, 9, generator=generator).to(device)
    for dim in (-1, 2):
        ours, twin = nn.Softmax(dim, backend=backend), torch.nn.Softmax(dim)
        torch.testing.assert_close(ours(x), twin(x))
        assert ours.state_dict() == twin.state_dict() == {}
    assert repr(nn.Softmax()) == "Softmax(dim=-1)"
    with pytest.raises(ValueError, match="dim must be the last dimension of x, -1 or 2, got 1"):
        nn.Softmax(1)(x)
    for dim in (-2, None):
        with pytest.raises(ValueError, match="dim must be the last dimension, -1, got"):
            nn.Softmax(dim)  # type: ignore[arg-type]
