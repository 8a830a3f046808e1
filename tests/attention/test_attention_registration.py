"""torch.ops.onepass.*: opcheck, torch.compile, export, fake and meta tensors, autocast, and what must raise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

import onepass
from onepass.core import env
from onepass.ops.attention import kernels, registration
from onepass.testing import faults

_OPS = torch.ops.onepass


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def qkv(generator: torch.Generator, seqlen_q: int = 7, seqlen_k: int = 9, grad: bool = False) -> list[Tensor]:
    shapes = ((2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 8))
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def plain_options(**changes: Any) -> tuple[Any, ...]:
    """The options of attention_fwd between v and backend."""
    options: dict[str, Any] = {
        "attn_bias": None,
        "alibi_slopes": None,
        "attn_sink": None,
        "key_mask": None,
        "rng_state": None,
        "softmax_scale": 0.25,
        "window_left": -1,
        "window_right": 0,
        "bottom_right": True,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "deterministic": False,
    }
    return tuple((options | changes).values())


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_forward(backend: str, grad: bool, generator: torch.Generator) -> None:
    torch.library.opcheck(_OPS.attention_fwd.default, (*qkv(generator, grad=grad), *plain_options(), backend))


def test_opcheck_forward_with_every_option(generator: torch.Generator) -> None:
    options = plain_options(
        attn_bias=torch.randn(1, 4, 7, 9, generator=generator).requires_grad_(),
        alibi_slopes=torch.rand(4, generator=generator),
        attn_sink=torch.randn(4, generator=generator).requires_grad_(),
        key_mask=torch.rand(2, 9, generator=generator) < 0.7,
        rng_state=torch.tensor([3, 4]),
        softcap=3.0,
        dropout_p=0.2,
    )
    torch.library.opcheck(_OPS.attention_fwd.default, (*qkv(generator, grad=True), *options, "reference"))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(backend: str, grad: bool, generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    out, lse = _OPS.attention_fwd(q, k, v, *plain_options(), backend)
    do, dlse = torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    tests = ["test_schema", "test_faketensor"] if grad else None  # its own gradient raises, as it should
    for needs in ((True, True, False, False), (True, False, False, False), (False, True, False, False)):
        args = (do, dlse, q.requires_grad_(grad), k, v, out, lse, *plain_options(), *needs, backend)
        torch.library.opcheck(_OPS.attention_bwd.default, args, **({} if tests is None else {"test_utils": tests}))


def test_opcheck_decode(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator, seqlen_q=1)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    for need_lse in (True, False):
        args = (q, k, v, lengths, *(None,) * 7, 0.25, -1, 0, 0.0, 0, need_lse, backend)
        torch.library.opcheck(_OPS.attention_decode.default, args)


def test_opcheck_decode_int4(generator: torch.Generator) -> None:
    q = torch.randn(2, 1, 4, 16, generator=generator)
    packed = [torch.randint(0, 256, (2, 9, 2, n), dtype=torch.uint8, generator=generator) for n in (8, 4)]
    pairs = [torch.rand(2, 9, 2, groups, 2, generator=generator).half() for groups in (2, 1)]
    args = (q, *packed, *(None,) * 6, *pairs, 0.25, -1, 0, 0.0, 0, True, "reference")
    torch.library.opcheck(_OPS.attention_decode.default, args)
    assert _OPS.attention_decode(*args)[0].shape == (2, 1, 4, 8)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_merge(backend: str, grad: bool, generator: torch.Generator) -> None:
    outs = torch.randn(3, 2, 7, 4, 8, generator=generator).requires_grad_(grad)
    lses = torch.randn(3, 2, 4, 7, generator=generator).requires_grad_(grad)
    torch.library.opcheck(_OPS.merge_attention.default, (outs, lses, backend))
    out, lse = (x.detach() for x in _OPS.merge_attention(outs, lses, backend))
    args = (torch.randn(out.shape, generator=generator), None, outs.detach(), lses.detach(), out, lse, backend)
    torch.library.opcheck(_OPS.merge_attention_bwd.default, args)


def test_compiles_with_at_most_two_graphs(backend: str, generator: torch.Generator) -> None:
    """Forward and backward, whole graphs, lengths that change; the same numbers as eager."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return onepass.attention(q, k, v, causal=True, window_size=(5, -1), return_lse=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((7, 9), (8, 20), (33, 12), (2, 2)):
        inputs = qkv(generator, *lengths, grad=True)
        with onepass.use_backend(backend):
            ours, eager = compiled(*inputs), step(*inputs)
        do = [torch.randn(x.shape, generator=generator) for x in eager]
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(torch.autograd.grad(ours, inputs, do), torch.autograd.grad(eager, inputs, do), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_compiles_without_gradients_and_decodes(backend: str, generator: torch.Generator) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        with onepass.use_backend(backend):
            return onepass.attention_decode(q, k, v, cache_seqlens=lengths)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for capacity in (9, 30, 64):
            q, k, v = qkv(generator, 2, capacity)
            lengths = torch.tensor([capacity, 5], dtype=torch.int32)
            torch.testing.assert_close(compiled(q, k, v, lengths), step(q, k, v, lengths))
    assert counter.frame_count <= 2


def test_compiled_code_follows_use_backend(fused: str, generator: torch.Generator) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(onepass.attention, fullgraph=True, backend=counter)
    inputs = qkv(generator)
    chosen = compiled(*inputs)
    with onepass.use_backend("reference"):
        by_name = compiled(*inputs)
    assert counter.frame_count == 2
    assert torch.equal(chosen, onepass.attention(*inputs))
    assert torch.equal(by_name, onepass.attention(*inputs, backend="reference"))


def test_compiles_with_dropout(generator: torch.Generator) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, rng_state: Tensor) -> Tensor:
        return onepass.attention(q, k, v, dropout_p=0.3, rng_state=rng_state, backend="reference")

    def fresh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return onepass.attention(q, k, v, dropout_p=0.3, backend="reference")

    inputs, state = qkv(generator), torch.tensor([5, 6])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, state), step(*inputs, state))
    assert torch.compile(fresh, fullgraph=True, backend="aot_eager")(*inputs).isfinite().all()


def test_compiles_under_autocast(backend: str, generator: torch.Generator) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return onepass.attention(q, k, v, backend=backend)

    inputs = qkv(generator)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert compiled.dtype is torch.bfloat16
    torch.testing.assert_close(compiled, step(*inputs))


def test_exports(backend: str, generator: torch.Generator) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return onepass.attention(q, k, v, causal=True, backend=backend)

    seqlen = torch.export.Dim("seqlen", min=2, max=512)
    inputs = tuple(qkv(generator, 9, 9))
    program = torch.export.export(Model(), inputs, dynamic_shapes=({1: seqlen},) * 3)
    nodes = [node for node in program.graph.nodes if node.target is _OPS.attention_fwd.default]
    assert len(nodes) == 1
    other = tuple(qkv(generator, 21, 21))
    torch.testing.assert_close(program.module()(*other), Model()(*other))


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        q, k, v = torch.empty(2, 7, 4, 16), torch.empty(2, 9, 2, 16), torch.empty(2, 9, 2, 8)
        out, lse = onepass.attention(q, k, v, return_lse=True)
        assert out.shape == (2, 7, 4, 8)
        assert (lse.shape, lse.dtype) == ((2, 4, 7), torch.float32)
        with pytest.raises(ValueError, match="k must have q's head_dim 16"):
            onepass.attention(q, v, v)
    q, k, v = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 7, 4, 16), *[(2, 9, 2, 16)] * 2)
    )
    out, lse = onepass.attention_decode(q, k, v, return_lse=True)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 7, 4, 16), torch.bfloat16)
    assert lse.dtype is torch.float32


def test_second_derivatives_raise(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator, grad=True)
    out = onepass.attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out, q, torch.randn(out.shape, generator=generator), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.square().sum().backward()


def test_decode_has_no_gradient(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator, 1, grad=True)
    out = onepass.attention_decode(q, k, v, backend=backend)
    with pytest.raises(NotImplementedError, match="attention_decode is forward only"):
        out.sum().backward()


def test_transforms_raise(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator)

    def attend(q: Tensor) -> Tensor:
        return onepass.attention(q, k, v, backend=backend)

    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.attention is not supported"):
        torch.vmap(attend)(torch.stack([q, q]))
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda q: attend(q).sum())(q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        attend(forward_ad.make_dual(q, torch.ones_like(q)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(backend: str, half: torch.dtype, generator: torch.Generator) -> None:
    if env.triton_interpreted() and half is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    q, k, v = qkv(generator, grad=True)
    with torch.autocast("cpu", dtype=half):
        twin = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        out = onepass.attention(q, k, v, backend=backend)
        mixed = onepass.attention(q, k.to(half), v, backend=backend)
    assert out.dtype is mixed.dtype is twin.dtype is half
    torch.testing.assert_close(out, twin.transpose(1, 2), rtol=0.02, atol=0.02)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert dq.dtype is torch.float32
    with torch.autocast("cpu", dtype=half):
        double = onepass.attention(q.double(), k.double(), v.double(), backend="reference")
    assert double.dtype is torch.float64


def test_plain_calls_skip_the_dispatcher_and_watched_ones_do_not(
    backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    op = registration.forward.op

    def watched(*args: Any) -> Any:
        calls.append("dispatcher")
        return op(*args)

    monkeypatch.setattr(registration.forward, "op", watched)
    q, k, v = qkv(generator)
    expected = onepass.attention(q, k, v, backend=backend)
    assert not calls
    with torch.profiler.profile() as profile:
        onepass.attention(q, k, v, backend=backend)
    assert any(event.key == "onepass::attention_fwd" for event in profile.key_averages())
    negated = torch.view_as_complex(torch.stack([q, q], -1)).conj().imag
    assert negated.is_neg()
    out = onepass.attention(negated, k, v, softmax_scale=-0.25, backend=backend)
    torch.testing.assert_close(out, expected)
    assert len(calls) == 2
    recorded = onepass.attention(q.requires_grad_(), k, v, backend=backend)
    assert recorded.requires_grad
    assert len(calls) == 2  # autograd alone does not need it
    with torch.profiler.profile():
        onepass.attention(q, k, v, backend=backend)
    assert len(calls) == 3


def test_use_backend_travels_into_backward(fused: str, generator: torch.Generator) -> None:
    used: list[str] = []

    def spy(launcher: Any) -> Any:
        def run(*args: Any) -> Any:
            used.append("backward")
            return launcher(*args)

        return run

    q, k, v = qkv(generator, grad=True)
    with faults.replaced(kernels.BACKWARD, "reference", spy):
        with onepass.use_backend("reference"):
            out = onepass.attention(q, k, v)
        out.sum().backward()
        assert used == ["backward"]
        onepass.attention(q, k, v, backend=fused).sum().backward()
    assert used == ["backward"]
