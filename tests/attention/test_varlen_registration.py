"""torch.ops.onepass.attention_varlen_*: opcheck, torch.compile, fake tensors, what must raise, and with which words."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import onepass
from onepass.core import env
from onepass.ops.attention.inputs_varlen import cumulated

_OPS = torch.ops.onepass


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def tensors(generator: torch.Generator, total_q: int = 12, total_k: int = 17, grad: bool = False) -> list[Tensor]:
    shapes = ((total_q, 4, 16), (total_k, 2, 16), (total_k, 2, 8))
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def options(**changes: Any) -> tuple[Any, ...]:
    """The options of attention_varlen_fwd between page_table and backend."""
    values: dict[str, Any] = {
        "attn_bias": None,
        "alibi_slopes": None,
        "attn_sink": None,
        "key_mask": None,
        "rng_state": None,
        "max_seqlen_q": 8,
        "max_seqlen_k": 9,
        "softmax_scale": 0.25,
        "window_left": -1,
        "window_right": 0,
        "bottom_right": True,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "deterministic": False,
    }
    return tuple((values | changes).values())


_LENGTHS = int32(0, 8, 8, 12), int32(0, 5, 8, 17)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_forward(backend: str, grad: bool, generator: torch.Generator) -> None:
    for used in (None, int32(5, 2, 9)):
        args = (*tensors(generator, grad=grad), *_LENGTHS, used, None, *options(), backend)
        torch.library.opcheck(_OPS.attention_varlen_fwd.default, args)


def test_opcheck_forward_with_every_option(generator: torch.Generator) -> None:
    more = options(
        attn_bias=torch.randn(3, 4, 8, 9, generator=generator).requires_grad_(),
        alibi_slopes=torch.rand(4, generator=generator),
        attn_sink=torch.randn(4, generator=generator).requires_grad_(),
        key_mask=torch.rand(17, generator=generator) < 0.7,
        rng_state=torch.tensor([3, 4]),
        softcap=3.0,
        dropout_p=0.2,
    )
    args = (*tensors(generator, grad=True), *_LENGTHS, None, None, *more, "reference")
    torch.library.opcheck(_OPS.attention_varlen_fwd.default, args)


def test_opcheck_pages(generator: torch.Generator) -> None:
    q = torch.randn(12, 4, 16, generator=generator)
    k, v = (torch.randn(6, 4, 2, n, generator=generator) for n in (16, 8))
    table = int32(3, 1, -1, 0, -1, -1, 5, 2, 4).view(3, 3)
    args = (q, k, v, _LENGTHS[0], None, int32(5, 2, 9), table, *options(), "reference")
    torch.library.opcheck(_OPS.attention_varlen_fwd.default, args)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(backend: str, grad: bool, generator: torch.Generator) -> None:
    q, k, v = tensors(generator)
    out, lse = _OPS.attention_varlen_fwd(q, k, v, *_LENGTHS, None, None, *options(), backend)
    do, dlse = torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    tests = ["test_schema", "test_faketensor"] if grad else None  # its own gradient raises, as it should
    for needs in ((True, True, False, False), (True, False, False, False)):
        args = (do, dlse, q.requires_grad_(grad), k, v, out, lse, *_LENGTHS, None, *options(), *needs, backend)
        torch.library.opcheck(
            _OPS.attention_varlen_bwd.default, args, **({} if tests is None else {"test_utils": tests})
        )


def test_compiles_with_at_most_two_graphs(backend: str, generator: torch.Generator) -> None:
    """Forward and backward, whole graphs, totals, batches and longest lengths that change."""

    def step(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return onepass.attention_varlen(
            q, k, v, cu_q, cu_k, **lengths, causal=True, window_size=(5, -1), return_lse=True, backend=backend
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for lengths_q, lengths_k in (((7, 3), (9, 4)), ((8, 20, 3), (5, 2, 40)), ((2, 0, 5, 9), (3, 4, 2, 2))):
        inputs = tensors(generator, sum(lengths_q), sum(lengths_k), grad=True)
        call = (*inputs, cumulated(lengths_q, "cpu"), cumulated(lengths_k, "cpu"), max(*lengths_q, *lengths_k))
        ours, eager = compiled(*call), step(*call)
        do = [torch.randn(x.shape, generator=generator) for x in eager]
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(torch.autograd.grad(ours, inputs, do), torch.autograd.grad(eager, inputs, do), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q, k, v = torch.empty(12, 4, 16), torch.empty(17, 2, 16), torch.empty(17, 2, 8)
        lengths = torch.empty(4, dtype=torch.int32)
        call: dict[str, Any] = {"max_seqlen_q": 8, "max_seqlen_k": 9}
        out, lse = onepass.attention_varlen(q, k, v, lengths, lengths, **call, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == ((12, 4, 8), (4, 12), torch.float32)
        with pytest.raises(ValueError, match="k must have q's head_dim 16"):
            onepass.attention_varlen(q, v, v, lengths, lengths, **call)


def test_transforms_and_second_derivatives_raise(backend: str, generator: torch.Generator) -> None:
    q, k, v = tensors(generator, grad=True)

    def attend(q: Tensor) -> Tensor:
        return onepass.attention_varlen(q, k, v, *_LENGTHS, max_seqlen_q=8, max_seqlen_k=9, backend=backend)

    (dq,) = torch.autograd.grad(attend(q), q, torch.randn(12, 4, 8, generator=generator), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.square().sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap over onepass\.attention_varlen is not supported"):
        torch.vmap(attend)(torch.stack([q.detach(), q.detach()]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, half: torch.dtype, generator: torch.Generator) -> None:
    if env.triton_interpreted() and half is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    inputs = tensors(generator)
    call: dict[str, Any] = {"max_seqlen_q": 8, "max_seqlen_k": 9, "backend": backend}
    with torch.autocast("cpu", dtype=half):
        out = onepass.attention_varlen(*inputs, *_LENGTHS, **call)
    expected = onepass.attention_varlen(*(x.to(half) for x in inputs), *_LENGTHS, **call)
    assert out.dtype is half
    assert torch.equal(out, expected)


# Wrong calls.


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(**changes: Any) -> Any:
    """A valid call but for what is given."""
    call: dict[str, Any] = {
        "q": zeros(12, 4, 16),
        "k": zeros(17, 2, 16),
        "v": zeros(17, 2, 8),
        "cu_seqlens_q": int32(0, 8, 8, 12),
        "cu_seqlens_k": int32(0, 5, 8, 17),
        "max_seqlen_q": 8,
        "max_seqlen_k": 9,
    }
    return onepass.attention_varlen(**(call | changes))


_PAGED: dict[str, Any] = {
    "k": zeros(5, 4, 2, 16),
    "v": zeros(5, 4, 2, 8),
    "cu_seqlens_k": None,
    "seqused_k": int32(5, 0, 9),
    "page_table": int32(1, 3, -1, -1, -1, -1, 0, 2, 4).view(3, 3),
    "backend": "reference",
}
_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": zeros(1, 12, 4, 16)}, ValueError, r"q must be \(total_q, nheads_q, head_dim\), got .*onepass.attention"),
    ({"k": zeros(17, 16)}, ValueError, r"k must be \(total_k, nheads_kv, head_dim\), got \(17, 16\)"),
    ({"k": zeros(17, 2, 12)}, ValueError, r"k must have q's head_dim 16 .*got \(17, 2, 12\)"),
    ({"v": zeros(16, 2, 8)}, ValueError, r"v must have k's sizes \(17, 2, 16\) but for the last"),
    ({"q": zeros(12, 3, 16)}, ValueError, r"q's 3 heads must be a multiple of k's 2"),
    ({"q": zeros(12, 4, 16, dtype=torch.int32)}, TypeError, r"q must be floating point"),
    ({"k": zeros(17, 2, 16, dtype=torch.half)}, TypeError, r"k must have q's dtype torch.float32, got float16"),
    ({"v": zeros(17, 2, 8).to("meta")}, ValueError, r"v must be on q's device"),
    ({"cu_seqlens_q": [0, 12]}, TypeError, r"cu_seqlens_q must be a torch.Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0, 8, 8, 12])}, TypeError, r"cu_seqlens_q must be int32, got int64"),
    ({"cu_seqlens_q": int32()}, ValueError, r"cu_seqlens_q must be \(batch \+ 1,\), got \(0,\)"),
    ({"cu_seqlens_q": int32(1, 8, 8, 12)}, ValueError, r"cu_seqlens_q must start at 0, got cu_seqlens_q\[0\] = 1"),
    ({"cu_seqlens_q": int32(0, 8, 7, 12)}, ValueError, r"cu_seqlens_q must not decrease, got cu_seqlens_q\[1\] = 8 be"),
    ({"cu_seqlens_q": int32(0, 8, 8, 11)}, ValueError, r"cu_seqlens_q must end at q's 12 tokens, got .*\[3\] = 11"),
    ({"cu_seqlens_k": int32(0, 5, 8)}, ValueError, r"cu_seqlens_k must be \(batch \+ 1,\) = \(4,\), got \(3,\)"),
    ({"cu_seqlens_k": int32(0, 5, 8, 18)}, ValueError, r"cu_seqlens_k must end at k's 17 tokens"),
    ({"cu_seqlens_k": None}, ValueError, r"cu_seqlens_k is needed without page_table"),
    ({"cu_seqlens_k": int32(0, 5, 8, 17).to("meta")}, ValueError, r"cu_seqlens_k must be on q's device"),
    ({"max_seqlen_q": 7}, ValueError, r"max_seqlen_q is 7, but sequence 0 has 8 by cu_seqlens_q"),
    ({"max_seqlen_k": 8}, ValueError, r"max_seqlen_k is 8, but sequence 2 has 9 by cu_seqlens_k"),
    ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q must be at least 0, got -1"),
    ({"max_seqlen_q": 8.0}, TypeError, r"max_seqlen_q must be an int, got 8.0"),
    ({"max_seqlen_k": torch.tensor(9)}, TypeError, r"max_seqlen_k must be an int"),
    ({"seqused_k": int32(5, 4, 9)}, ValueError, r"seqused_k\[1\] is 4, expected 0 to 3 keys of its sequence"),
    ({"seqused_k": int32(5, 3)}, ValueError, r"seqused_k must be \(batch,\) = \(3,\), got \(2,\)"),
    ({"seqused_k": zeros(3)}, TypeError, r"seqused_k must be int32, got float32"),
    ({"attn_bias": zeros(3, 4, 8, 8)}, ValueError, r"\(batch, nheads_q, max_seqlen_q, max_seqlen_k\) = \(3, 4, 8, 9\)"),
    ({"key_mask": zeros(3, 9) > 0}, ValueError, r"key_mask must be \(total_k,\) = \(17,\), got \(3, 9\)"),
    ({"alibi_slopes": zeros(5)}, ValueError, r"alibi_slopes must be \(nheads_q,\) = \(4,\) or \(batch, nheads_q\)"),
    ({"block_table": None}, TypeError, r"'block_table': use page_table="),
    ({"cache_seqlens": None}, TypeError, r"'cache_seqlens': use seqused_k="),
    ({"window_size": 3}, ValueError, r"window_size must be a pair"),
    ({"k": zeros(17, 2, 16).to_sparse()}, TypeError, r"k must be a dense, strided"),
    ({**_PAGED, "k": zeros(17, 2, 16)}, ValueError, r"k must be \(pages, page_size, nheads_kv, head_dim\) with page_t"),
    ({**_PAGED, "seqused_k": None}, ValueError, r"seqused_k or cu_seqlens_k is needed with page_table"),
    ({**_PAGED, "page_table": int32(1, 2, 3)}, ValueError, r"page_table must be \(batch, max_pages\) with batch 3"),
    ({**_PAGED, "key_mask": zeros(20) > 0}, ValueError, r"key_mask is \(total_k,\) of packed keys"),
    ({**_PAGED, "seqused_k": int32(5, 0, 13), "max_seqlen_k": 13}, ValueError, r"13 keys, but page_table holds 12"),
    ({**_PAGED, "seqused_k": int32(5, 1, 9)}, ValueError, r"page_table\[1, 0\] is -1, but there are 5 pages"),
    ({**_PAGED, "seqused_k": int32(5, -1, 9)}, ValueError, r"seqused_k\[1\] is -1"),
]


@pytest.mark.parametrize("case", _BAD, ids=lambda case: next(iter(case[0])))
def test_message(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, error, message = case
    with pytest.raises(error, match=message):
        attend(**changes)


def test_the_valid_calls_are_valid() -> None:
    assert attend().shape == (12, 4, 8)
    assert attend(**_PAGED).shape == (12, 4, 8)
    assert attend(max_seqlen_q=2**40).shape == (12, 4, 8)


def test_padded_attention_names_the_packed_one() -> None:
    q = zeros(2, 6, 4, 16)
    with pytest.raises(TypeError, match=r"'cu_seqlens_q': .*onepass\.attention_varlen"):
        onepass.attention(q, q, q, cu_seqlens_q=int32(0, 12))


def test_contents_are_checked_on_every_backend(backend: str) -> None:
    for _ in range(3):  # also where a call has been seen before
        assert attend(backend=backend).shape == (12, 4, 8)
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        attend(backend=backend, cu_seqlens_q=int32(0, 8, 7, 12))


def test_raw_operations_check_as_well(generator: torch.Generator) -> None:
    q, k, v = tensors(generator)
    with pytest.raises(ValueError, match="v must have k's sizes"):
        _OPS.attention_varlen_fwd(q, k, v[1:], *_LENGTHS, None, None, *options(), "")
    with pytest.raises(ValueError, match="cu_seqlens_k must end at k's 17 tokens"):
        _OPS.attention_varlen_fwd(q, k, v, _LENGTHS[0], _LENGTHS[0], None, None, *options(), "")
    needs = (True, True, False, False)
    out = zeros(12, 4, 8)
    with pytest.raises(ValueError, match=r"lse must be torch.float32 \(4, 12\)"):
        _OPS.attention_varlen_bwd(out, None, q, k, v, out, zeros(12, 4), *_LENGTHS, None, *options(), *needs, "")


def test_explain_names_both_directions() -> None:
    q = zeros(12, 4, 16).requires_grad_()
    arguments = q, zeros(17, 2, 16), zeros(17, 2, 8), *_LENGTHS
    explanation = onepass.explain("attention_varlen", *arguments, max_seqlen_q=8, max_seqlen_k=9, backend="reference")
    assert [choice.op for choice in explanation] == ["attention_varlen forward", "attention_varlen backward"]
    assert list(explanation.backends) == ["reference"] * 2
