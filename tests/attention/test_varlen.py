"""attention_varlen: what must hold between it and attention, which inputs.py's cases do not show."""

from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass import nn
from onepass.core import env
from onepass.ops.attention import kernels
from onepass.ops.attention.inputs_varlen import CASES, VarlenCase, cumulated
from onepass.testing import conformance, faults, numerics, replays
from onepass.testing.inputs import normal

_PACKED = [case for case in CASES if case.page_size is None]


def qkv(
    generator: torch.Generator, total_q: int = 20, total_k: int = 30, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = ((total_q, 4, 16), (total_k, 2, 16), (total_k, 2, 8))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("case", [case for case in _PACKED if not case.dropout_p], ids=lambda case: case.name)
def test_is_attention_on_every_sequence(case: VarlenCase, backend: str, generator: torch.Generator) -> None:
    if env.triton_interpreted() and case.name != "varlen, causal":
        pytest.skip("Triton's interpreter takes long: one case here, all of them against the oracle")
    inputs = case.inputs(torch.float32, "cpu", generator)
    if backend not in case.backends(inputs):
        pytest.skip(f"{backend} refuses this case")
    out, lse = (case.call(inputs, backend)[name] for name in ("out", "lse"))
    whole = case.by_attention(inputs, backend)
    assert out.shape[0] == sum(part.shape[1] for part, _ in whole)
    for part, part_lse, (expected, expected_lse) in zip(
        out.split(case.seqlens_q), lse.split(case.seqlens_q, 1), whole, strict=True
    ):
        torch.testing.assert_close(part, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part_lse, expected_lse[0], rtol=1e-5, atol=1e-5)


def test_equal_lengths_are_a_batch_with_its_dropout(backend: str, generator: torch.Generator) -> None:
    """Forward and gradients; the mask counts batches, queries and keys alike."""
    padded = [x.unflatten(0, (3, -1)).requires_grad_() for x in qkv(generator, 30, 42)]
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.4, "rng_state": torch.tensor([5, 6]), "backend": backend}
    lengths = cumulated((10,) * 3, "cpu"), cumulated((14,) * 3, "cpu")
    packed = (x.flatten(0, 1) for x in padded)
    ours = onepass.attention_varlen(*packed, *lengths, max_seqlen_q=10, max_seqlen_k=14, **options)
    theirs = onepass.attention(*padded, **options).flatten(0, 1)
    torch.testing.assert_close(ours, theirs)
    do = torch.randn(ours.shape, generator=generator)
    for a, b in zip(torch.autograd.grad(ours, padded, do), torch.autograd.grad(theirs, padded, do), strict=True):
        torch.testing.assert_close(a, b)


def test_a_sequence_alone_is_the_sequence_in_a_batch(backend: str, generator: torch.Generator) -> None:
    """To the last bit, whatever its neighbours hold: NaN stays in its own sequence, in the gradients too."""
    q, k, v = qkv(generator, 70, 90)
    alone = [x[10 : 10 + n].clone().requires_grad_() for x, n in ((q, 40), (k, 50), (v, 50))]
    for x, n in ((q, 40), (k, 50), (v, 50)):
        x[:10], x[10 + n :] = torch.nan, torch.nan
    together = [x.requires_grad_() for x in (q, k, v)]
    options: dict[str, Any] = {"max_seqlen_q": 40, "max_seqlen_k": 50, "causal": True, "backend": backend}
    lengths = cumulated((10, 40, 20), "cpu"), cumulated((10, 50, 30), "cpu")
    out = onepass.attention_varlen(*together, *lengths, **options)
    own = onepass.attention_varlen(*alone, cumulated((40,), "cpu"), cumulated((50,), "cpu"), **options)
    assert torch.equal(out[10:50], own)
    do = torch.randn(out.shape, generator=generator)
    ours, theirs = torch.autograd.grad(out, together, do), torch.autograd.grad(own, alone, do[10:50])
    for x, expected in zip(ours, theirs, strict=True):
        assert torch.equal(x[10 : 10 + len(expected)], expected)


def test_chunked_prefill_is_prefill(backend: str, generator: torch.Generator) -> None:
    """The last queries of each sequence over a paged cache, whose other pages and places hold NaN."""
    case = VarlenCase("pages", (5, 1, 12), (33, 50, 12), used=(33, 50, 12), page_size=8, causal=True)
    inputs = case.inputs(torch.float32, "cpu", generator)
    if backend not in case.backends(inputs):
        pytest.skip(f"{backend} refuses pages")
    out = case.call(inputs, backend)["out"]
    first = 0
    for index, (queries, keys) in enumerate(zip(case.seqlens_q, case.keys, strict=True)):
        pages = inputs["page_table"][index, : -(-keys // 8)].long()
        k, v = (inputs[name][pages].flatten(0, 1)[None, :keys] for name in ("k", "v"))
        part = slice(first, first + queries)
        expected = onepass.attention(inputs["q"][None, part], k, v, causal=True, backend=backend)
        torch.testing.assert_close(out[part], expected[0], rtol=1e-5, atol=1e-5)
        first += queries
    cumulative = {**inputs, "cu_seqlens_k": cumulated(case.keys, "cpu")}
    del cumulative["seqused_k"]  # cu_seqlens_k then gives the lengths
    assert torch.equal(case.call(cumulative, backend)["out"], out)


def test_pages_have_no_gradient(backend: str, generator: torch.Generator) -> None:
    case = VarlenCase("pages", used=(33, 50, 5), page_size=8)
    inputs = case.inputs(torch.float32, "cpu", generator)
    if backend not in case.backends(inputs):
        pytest.skip(f"{backend} refuses pages")
    inputs["q"].requires_grad_()
    out = onepass.attention_varlen(*case.tensors(inputs), **case.options(inputs), backend=backend)
    with pytest.raises(NotImplementedError, match="attention_varlen with page_table is forward only"):
        out.sum().backward()


def test_only_the_needed_gradients(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    lengths = cumulated((13, 0, 7), "cpu"), cumulated((9, 4, 17), "cpu")

    def gradients(*wanted: bool) -> list[Tensor]:
        inputs = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), wanted, strict=True)]
        out = onepass.attention_varlen(*inputs, *lengths, max_seqlen_q=13, max_seqlen_k=17, backend=backend)
        return list(torch.autograd.grad(out, [x for x in inputs if x.requires_grad], out))

    everything = gradients(True, True, True)
    for place in range(3):
        (alone,) = gradients(*(place == other for other in range(3)))
        assert torch.equal(alone, everything[place])


def test_outputs_are_fresh_and_contiguous(backend: str, generator: torch.Generator) -> None:
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv(generator)]
    lengths = cumulated((13, 7), "cpu"), cumulated((13, 17), "cpu")
    out, lse = onepass.attention_varlen(
        *inputs, *lengths, max_seqlen_q=13, max_seqlen_k=17, return_lse=True, backend=backend
    )
    gradients = torch.autograd.grad(out, inputs, torch.ones(()).expand(out.shape))
    assert [x.shape for x in (out, lse)] == [(20, 4, 8), (4, 20)]
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert all(x.is_contiguous() for x in (out, lse, *gradients))


def test_lengths_of_any_strides(backend: str, generator: torch.Generator) -> None:
    tensors = qkv(generator)
    lengths = [cumulated((13, 7), "cpu"), cumulated((13, 17), "cpu")]
    options: dict[str, Any] = {"max_seqlen_q": 13, "max_seqlen_k": 17, "backend": backend}
    expected = onepass.attention_varlen(*tensors, *lengths, **options)
    strided = [torch.stack([x, x + 100], 1)[:, 0] for x in lengths]
    assert torch.equal(onepass.attention_varlen(*tensors, *strided, **options), expected)


@pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are never replayed")
def test_changed_lengths_are_seen_by_later_calls(fused: str, device: str, generator: torch.Generator) -> None:
    """Nothing is repeated from an earlier call that rests on what the lengths were."""
    tensors = [x.to(device) for x in qkv(generator, 20, 20)]
    lengths = cumulated((13, 7), device)
    for last in (13, 4, 4, 4, 9, 20, 0, 13):
        lengths[1] = last
        options: dict[str, Any] = {"max_seqlen_q": 20, "max_seqlen_k": 20, "causal": True}
        for _ in range(replays.SEEN):
            out = onepass.attention_varlen(*tensors, lengths, lengths, **options, backend=fused)
            expected = onepass.attention_varlen(*tensors, lengths, lengths, **options, backend="reference")
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_module(backend: str, generator: torch.Generator) -> None:
    tensors = qkv(generator)
    arguments = cumulated((13, 7), "cpu"), cumulated((13, 17), "cpu")
    options: dict[str, Any] = {"max_seqlen_q": 13, "max_seqlen_k": 17, "return_lse": True}
    ours = nn.Attention(causal=True, softmax_scale=0.3, backend=backend).varlen(*tensors, *arguments, **options)
    theirs = onepass.attention_varlen(*tensors, *arguments, **options, causal=True, softmax_scale=0.3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("pair", [("cpu", "reference"), ("reference", "cpu")])
def test_backward_follows_forward(pair: tuple[str, str], generator: torch.Generator) -> None:
    if not set(pair) <= set(kernels.VARLEN_FORWARD.usable):
        pytest.skip("not usable here")
    conformance.backward_follows_forward(CASES[:3], kernels.VARLEN_BACKWARD, pair, "cpu", generator)


_OFF_BY_ONE = {
    "queries shifted": (3, lambda x: torch.cat([x[:1], x[1:-1] - 1, x[-1:]])),
    "keys shifted": (4, lambda x: torch.cat([x[:1], x[1:-1] + 1, x[-1:]])),
    "one key too many": (5, lambda x: x + 1),
    "mask off by one": (16, lambda right: right + 1),
}


@pytest.mark.parametrize("fault", _OFF_BY_ONE.values(), ids=_OFF_BY_ONE)
def test_fault_is_noticed(fused: str, fault: Any, generator: torch.Generator) -> None:
    place, change = fault

    def planted(launcher: Any) -> Any:
        def run(*args: Any) -> Any:
            changed = list(args)
            changed[place] = change(changed[place])
            return launcher(*changed)

        return run

    case = VarlenCase("fault", seqlens_k=(40, 50, 20), used=(33, 44, 9), causal=True, longer=1)
    inputs = case.inputs(torch.float32, "cpu", generator)
    numerics.assert_within_budget(numerics.compare_inputs(case, inputs, fused))
    with faults.replaced(kernels.VARLEN_FORWARD, fused, planted), pytest.raises(AssertionError, match="budgets"):
        numerics.assert_within_budget(numerics.compare_inputs(case, inputs, fused))


@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (1, 2, 7, 9), (2, 1, 7, 9), (2, 2, 7, 9), (1, 1, 7, 1), (2, 1, 1, 9)])
def test_gradients_of_biases_of_longer_sequences_than_there_are(
    fused: str, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """max_seqlen_k, and the bias with it, may be more than all keys together."""
    q, k, v = (normal((total, 2, 16), torch.float32, "cpu", generator) for total in (6, 4, 4))
    bias = normal(shape, torch.float32, "cpu", generator).requires_grad_()
    do = normal((6, 2, 16), torch.float32, "cpu", generator)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 6], [0, 3, 4]))
    options: dict[str, Any] = {"max_seqlen_q": max(5, shape[2]), "max_seqlen_k": max(3, shape[3]), "attn_bias": bias}
    ours, expected = (
        torch.autograd.grad(onepass.attention_varlen(q, k, v, cu_q, cu_k, backend=backend, **options), bias, do)[0]
        for backend in (fused, "reference")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
