"""repeat_kv: against PyTorch, edges, bad input, planted faults, registration, and the module."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import onepass
from onepass import nn
from onepass.ops.repeat_kv import kernels
from onepass.ops.repeat_kv.inputs import RepeatKvCase
from onepass.testing import conformance

_OPS = torch.ops.onepass


def test_is_repeat_interleave(backend: str, device: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 3, 16, generator=generator).to(device, dtype).requires_grad_()
    for n_rep in (1, 2, 7):
        out, expected = onepass.repeat_kv(x, n_rep, backend=backend), x.repeat_interleave(n_rep, 2)
        assert torch.equal(out, expected)
        assert out.data_ptr() != x.data_ptr()
        dout = torch.randint(-8, 9, out.shape, generator=generator).to(device, dtype)  # sums are exact in any order
        (ours,), (theirs,) = (torch.autograd.grad(y, x, dout) for y in (out, expected))
        assert torch.equal(ours, theirs)


def test_attention_sees_the_same_heads(backend: str, device: str, generator: torch.Generator) -> None:
    """Key head h serves the query heads h * n_rep to h * n_rep + n_rep - 1."""
    q, k, v = (torch.randn(1, 6, heads, 8, generator=generator).to(device) for heads in (6, 2, 2))
    repeated = [onepass.repeat_kv(x, 3, backend=backend) for x in (k, v)]
    torch.testing.assert_close(
        onepass.attention(q, *repeated, backend="reference"), onepass.attention(q, k, v, backend="reference")
    )


def test_gradient_is_summed_in_fp32(backend: str, device: str) -> None:
    """In fp16 one after the other, 2048 + 1 + 1 would stay 2048."""
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float16, requires_grad=True, device=device)
    dout = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16, device=device).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    (dx,) = torch.autograd.grad(onepass.repeat_kv(x, 3, backend=backend), x, dout)
    assert (dx == 2050).all()


def test_rows_do_not_meet(fused: str, device: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A token with NaN or inf spoils itself alone; a token alone is the token among others."""
    x = torch.randn(1, 6, 2, 40, generator=generator).to(device, dtype)
    dout = torch.randn(1, 6, 6, 40, generator=generator).to(device, dtype)
    x[0, 1], dout[0, 4] = torch.nan, torch.inf
    x.requires_grad_()
    out = onepass.repeat_kv(x, 3, backend=fused)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert out[0, [0, 2, 3, 4, 5]].isfinite().all()
    assert dx[0, [0, 1, 2, 3, 5]].isfinite().all()
    for i in (0, 2, 5):
        alone = x[:, i : i + 1].detach().requires_grad_()
        one = onepass.repeat_kv(alone, 3, backend=fused)
        assert torch.equal(one, out[:, i : i + 1])
        assert torch.equal(torch.autograd.grad(one, alone, dout[:, i : i + 1])[0], dx[:, i : i + 1])


def test_widest_row(fused: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(1, 1, 2, 262144, generator=generator).to(device).requires_grad_()
    out = onepass.repeat_kv(x, 2, backend=fused)
    assert torch.equal(out, x.repeat_interleave(2, 2))
    assert torch.equal(torch.autograd.grad(out, x, out.detach())[0], 2 * x)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st() -> None:
    x = torch.zeros(1, 2**13 + 3, 512, 128, dtype=torch.float16, device="cuda")
    x[0, -1] = 3.0
    x.requires_grad_()
    out = onepass.repeat_kv(x, 4, backend="triton")
    assert out.numel() > 2**31
    assert (out[0, -1] == 3.0).all()
    assert (torch.autograd.grad(out, x, out.detach())[0][0, -1] == 12.0).all()


X = torch.randn(2, 5, 3, 8)
BAD = {
    "list": (lambda: onepass.repeat_kv([1.0], 2), TypeError, "x must be a torch.Tensor, got list"),
    "integers": (lambda: onepass.repeat_kv(X.int(), 2), TypeError, "x must be floating point, got int32 (2, 5, 3, 8)"),
    "dimensions": (
        lambda: onepass.repeat_kv(X[0], 2),
        ValueError,
        "x must be (batch, seqlen, nheads_kv, head_dim), got (5, 3, 8)",
    ),
    "n_rep": (lambda: onepass.repeat_kv(X, 0), ValueError, "n_rep must be at least 1, got 0"),
    "float": (lambda: onepass.repeat_kv(X, 2.0), TypeError, "n_rep must be an int, got 2.0"),
    "bool": (lambda: onepass.repeat_kv(X, True), TypeError, "n_rep must be an int, got True"),
    "unknown": (lambda: onepass.repeat_kv(X, 2, dim=1), TypeError, "heads are x's third dimension"),
    "raw dout": (
        lambda: _OPS.repeat_kv_bwd(X, 2, ""),
        ValueError,
        "n_rep must be at least 1 and divide dout's 3 heads",
    ),
    "raw dtype": (lambda: _OPS.repeat_kv_bwd(X.int(), 3, ""), TypeError, "dout must be floating point"),
    "double": (lambda: onepass.repeat_kv(X.double(), 2), onepass.UnsupportedError, "x's dtype float64"),
    "module": (lambda: nn.RepeatKV(0), ValueError, "n_rep must be at least 1, got 0"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def _mapped_by_remainder(x: Tensor, n_rep: int) -> Tensor:
    return x.repeat(1, 1, n_rep, 1)


def _one_head_short(launcher: Any) -> Any:
    def run(dout: Tensor, n_rep: int) -> Tensor:
        kept = dout.clone()
        kept[:, :, n_rep - 1 :: n_rep] = 0
        return launcher(kept, n_rep)

    return run


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (kernels.FORWARD, lambda launcher: _mapped_by_remainder),
        (kernels.FORWARD, lambda launcher: lambda x, n_rep: launcher(x, n_rep) * 1.001),
        (kernels.BACKWARD, _one_head_short),
        (kernels.BACKWARD, lambda launcher: lambda dout, n_rep: launcher(dout, n_rep).flip(2)),
    ],
    ids=["heads by remainder", "a thousandth off", "one head of the group forgotten", "heads mixed up"],
)
def test_fault_is_noticed(table: Any, fault: Any, fused: str, device: str, generator: torch.Generator) -> None:
    case = RepeatKvCase("plain")
    inputs = case.inputs(torch.float32, device, generator)
    conformance.fault_is_noticed(case, inputs, fused, table, fault)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend: str, device: str, grad: bool, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 3, 8, generator=generator).to(device).requires_grad_(grad)
    torch.library.opcheck(_OPS.repeat_kv_fwd.default, (x, 4, backend))
    torch.library.opcheck(_OPS.repeat_kv_bwd.default, (x.detach(), 3, backend))


def test_compiles_with_at_most_two_graphs(backend: str, device: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor) -> Tensor:
        return onepass.repeat_kv(k, q.shape[2] // k.shape[2])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seqlen, heads in ((7, 4), (20, 6), (2, 8)):
        q, k = (torch.randn(2, seqlen, n, 8, generator=generator).to(device) for n in (heads, 2))
        k.requires_grad_()
        with onepass.use_backend(backend):
            ours, eager = compiled(q, k), step(q, k)
        assert torch.equal(ours, eager)
        dout = torch.randn(eager.shape, generator=generator).to(device)
        assert torch.equal(torch.autograd.grad(ours, k, dout)[0], torch.autograd.grad(eager, k, dout)[0])
    assert counter.frame_count <= 2


def test_fake_tensors_and_second_derivatives(backend: str, device: str) -> None:
    with FakeTensorMode():
        out = onepass.repeat_kv(torch.empty(2, 3, 5, 8, dtype=torch.bfloat16).transpose(1, 2), 4)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 5, 12, 8), torch.bfloat16, True)
    x = X.to(device, copy=True).requires_grad_()
    out = onepass.repeat_kv(x, 2, backend=backend)
    dout = torch.randn(out.shape, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(out, x, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.square().sum().backward()


def test_module_and_explain(backend: str, device: str) -> None:
    module = nn.RepeatKV(3, backend=backend)
    x = X.to(device, copy=True)
    assert torch.equal(module(x), onepass.repeat_kv(x, 3, backend=backend))
    assert repr(module) == f"RepeatKV(3, backend={backend!r})"
    x.requires_grad_()
    assert list(onepass.explain("repeat_kv", x, 3, backend=backend).backends) == [backend] * 2
