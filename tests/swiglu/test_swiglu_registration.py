"""torch.ops.onepass.swiglu_*: opcheck, torch.compile, autocast, and what must raise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import onepass
from onepass.ops.swiglu import kernels, registration
from onepass.testing import faults

_OPS = torch.ops.onepass


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def gate_and_up(
    generator: torch.Generator, device: str, rows: int = 7, columns: int = 20, grad: bool = False
) -> list[Tensor]:
    return [torch.randn(2, rows, columns, generator=generator).to(device).requires_grad_(grad) for _ in range(2)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_opcheck_forward(backend: str, device: str, activation: str, grad: bool, generator: torch.Generator) -> None:
    torch.library.opcheck(_OPS.swiglu_fwd.default, (*gate_and_up(generator, device, grad=grad), activation, backend))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(backend: str, device: str, grad: bool, generator: torch.Generator) -> None:
    gate, up = gate_and_up(generator, device)
    dout = torch.randn(gate.shape, generator=generator).to(device)
    tests = {"test_utils": ["test_schema", "test_faketensor"]} if grad else {}  # its own gradient raises, as it should
    for needs in ((True, True), (True, False), (False, True)):
        args = (dout, gate.requires_grad_(grad), up, "silu", *needs, backend)
        torch.library.opcheck(_OPS.swiglu_bwd.default, args, **tests)


def test_compiles_with_at_most_two_graphs(backend: str, device: str, generator: torch.Generator) -> None:
    """Forward and backward, whole graphs, lengths that change; the same numbers as eager."""

    def step(gate: Tensor, up: Tensor) -> Tensor:
        return onepass.swiglu(gate, up) + onepass.geglu(up, gate, approximate="tanh")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns in ((7, 20), (8, 33), (2, 2)):
        inputs = gate_and_up(generator, device, rows, columns, grad=True)
        with onepass.use_backend(backend):
            ours, eager = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(ours, eager)
        dout = torch.randn(eager.shape, generator=generator).to(device)
        for a, b in zip(torch.autograd.grad(ours, inputs, dout), torch.autograd.grad(eager, inputs, dout), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_fake_tensors() -> None:
    with FakeTensorMode():
        gate = torch.empty(2, 7, 16, dtype=torch.bfloat16).transpose(0, 1)
        out = onepass.swiglu(gate, gate)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((7, 2, 16), torch.bfloat16, True)
        with pytest.raises(ValueError, match="up must have gate's shape"):
            onepass.swiglu(gate, gate[:1])


def test_second_derivatives_and_transforms_raise(backend: str, device: str, generator: torch.Generator) -> None:
    gate, up = gate_and_up(generator, device, grad=True)
    out = onepass.swiglu(gate, up, backend=backend)
    (dgate,) = torch.autograd.grad(out, gate, torch.randn(out.shape, generator=generator).to(device), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dgate.square().sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.swiglu"):
        torch.vmap(lambda x: onepass.swiglu(x, x, backend=backend))(up.detach())
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: onepass.swiglu(x, x, backend=backend).sum())(up.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        onepass.swiglu(forward_ad.make_dual(gate.detach(), torch.ones_like(gate)), up.detach(), backend=backend)


def test_autocast_keeps_the_dtype(backend: str, device: str, generator: torch.Generator) -> None:
    """As torch.nn.functional.silu, which no autocast touches."""
    gate, up = gate_and_up(generator, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(onepass.swiglu(gate, up, backend=backend), onepass.swiglu(gate, up, backend=backend))
        assert onepass.swiglu(gate, up, backend=backend).dtype is torch.nn.functional.silu(gate).dtype
        assert onepass.swiglu(gate.half(), up.half(), backend=backend).dtype is torch.float16


def test_plain_calls_skip_the_dispatcher(
    backend: str, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    op = registration.forward

    def watched(*args: Any) -> Any:
        calls.append("dispatcher")
        return op(*args)

    monkeypatch.setattr(registration.gated, "_dispatched", watched)
    gate, up = gate_and_up(generator, device)
    expected = onepass.swiglu(gate, up, backend=backend)
    assert not calls
    assert torch.equal(onepass.swiglu(gate.requires_grad_(), up, backend=backend), expected)
    assert calls


def test_use_backend_travels_into_backward(fused: str, device: str, generator: torch.Generator) -> None:
    used: list[str] = []

    def spy(launcher: Any) -> Any:
        def run(*args: Any) -> Any:
            used.append("backward")
            return launcher(*args)

        return run

    gate, up = gate_and_up(generator, device, grad=True)
    with faults.replaced(kernels.BACKWARD, "reference", spy):
        with onepass.use_backend("reference"):
            out = onepass.swiglu(gate, up)
        out.sum().backward()
        assert used == ["backward"]
        onepass.swiglu(gate, up, backend=fused).sum().backward()
    assert used == ["backward"]
