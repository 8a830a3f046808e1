"""torch.ops.onepass.rope: opcheck, torch.compile, autocast, and what must raise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import onepass
from onepass import nn
from onepass.ops.rope import kernels, registration
from onepass.testing import faults

_OPS = torch.ops.onepass


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def qk(generator: torch.Generator, device: str, seqlen: int = 7, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, seqlen, heads, 12, generator=generator).to(device).requires_grad_(grad) for heads in (4, 2)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(backend: str, device: str, grad: bool, inverse: bool, generator: torch.Generator) -> None:
    ids = torch.randint(0, 30, (2, 7), generator=generator).to(device)
    for table, position_ids in (
        (onepass.rope_table(8, 7, device=device), None),
        (onepass.rope_table(8, 30, device=device), ids),
    ):
        args = (*qk(generator, device, grad=grad), *table, position_ids, inverse, inverse, backend)
        torch.library.opcheck(_OPS.rope.default, args)


def test_compiles_with_at_most_two_graphs(backend: str, device: str, generator: torch.Generator) -> None:
    """Forward and backward, whole graphs, lengths that change; the same numbers as eager."""

    def step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return onepass.rope(q, k, cos, sin, interleaved=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (7, 20, 2):
        inputs, table = qk(generator, device, seqlen, grad=True), onepass.rope_table(8, seqlen, device=device)
        with onepass.use_backend(backend):
            ours, eager = compiled(*inputs, *table), step(*inputs, *table)
        douts = [torch.randn(x.shape, generator=generator).to(device) for x in eager]
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, douts), torch.autograd.grad(eager, inputs, douts), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_module_compiles(backend: str, device: str, generator: torch.Generator) -> None:
    module = nn.RotaryEmbedding(8, 40, scaling=onepass.RopeScaling(), backend=backend).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (7, 20, 2):
        for a, b in zip(compiled(*qk(generator, device, seqlen)), module(*qk(generator, device, seqlen)), strict=True):
            assert a.shape == b.shape
    assert counter.frame_count <= 2
    q, k = qk(generator, device)
    ids = torch.randint(0, 40, (2, 7), generator=generator).to(device)
    for position_ids in (ids, ids + 0.5):
        for a, b in zip(
            compiled(q, k, position_ids=position_ids), module(q, k, position_ids=position_ids), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 7, 16, dtype=torch.bfloat16).transpose(1, 2)
        cos = torch.empty(7, 8)
        q_out, k_out = onepass.rope(q, q[:, :, :2], cos, cos)
        assert (q_out.shape, q_out.dtype, q_out.is_contiguous()) == (q.shape, torch.bfloat16, True)
        assert k_out.shape == (2, 7, 2, 16)
        ids = torch.zeros(2, 7, dtype=torch.int64)
        assert onepass.rope(q, q, cos, cos, position_ids=ids)[0].shape == q.shape
        with pytest.raises(ValueError, match="cos and sin must be"):
            onepass.rope(q, q, cos[:3], cos[:3])


def test_transforms_raise(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = qk(generator, device)
    cos, sin = onepass.rope_table(8, 7, device=device)

    def first(q: Tensor) -> Tensor:
        return onepass.rope(q, k, cos, sin, backend=backend)[0]

    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.rope"):
        torch.vmap(first)(torch.stack([q, q]))
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda q: first(q).sum())(q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        first(forward_ad.make_dual(q, torch.ones_like(q)))


def test_autocast_keeps_the_dtype(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = qk(generator, device)
    table = onepass.rope_table(8, 7, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.float16):
            out = onepass.rope(q.to(dtype), k.to(dtype), *table, backend=backend)
            assert out[0].dtype is out[1].dtype is dtype


def test_plain_calls_skip_the_dispatcher(
    backend: str, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    op = registration.forward

    def watched(*args: Any) -> Any:
        calls.append("dispatcher")
        return op(*args)

    monkeypatch.setattr(registration.rotated, "_dispatched", watched)
    q, k = qk(generator, device)
    table = onepass.rope_table(8, 7, device=device)
    expected = onepass.rope(q, k, *table, backend=backend)
    assert not calls
    ours = onepass.rope(q.requires_grad_(), k, *table, backend=backend)
    assert torch.equal(ours[0], expected[0])
    assert calls


def test_use_backend_travels_into_backward(fused: str, device: str, generator: torch.Generator) -> None:
    used: list[bool] = []

    def spy(launcher: Any) -> Any:
        def run(*args: Any) -> Any:
            used.append(args[-1])
            return launcher(*args)

        return run

    table = onepass.rope_table(8, 7, device=device)
    with faults.replaced(kernels.FORWARD, "reference", spy):
        with onepass.use_backend("reference"):
            out = onepass.rope(*qk(generator, device, grad=True), *table)
        out[0].sum().backward()
        assert used == [False, True]
        onepass.rope(*qk(generator, device, grad=True), *table, backend=fused)[1].sum().backward()
    assert used == [False, True]
