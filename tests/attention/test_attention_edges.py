"""Edges: rows and problems without keys, nonfinite inputs, strides, outputs, offsets past 2**31, unread memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.ops.attention.error_terms import rounding_terms
from onepass.testing import numerics
from onepass.testing.inputs import normal


def qkv(
    generator: torch.Generator, seqlen_q: int = 20, seqlen_k: int = 30, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = ((2, seqlen_q, 4, 32), (2, seqlen_k, 2, 32), (2, seqlen_k, 2, 24))
    return [normal(shape, dtype, "cpu", generator) for shape in shapes]


def in_int4(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The caches, and the options that say what their nibbles mean."""
    (k, k_pairs), (v, v_pairs) = map(onepass.quantize_kv_int4, (k, v))
    return k, v, {"k_scale_shift": k_pairs, "v_scale_shift": v_pairs}


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
def test_empty_problems(backend: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q = torch.ones(batch, seqlen_q, 4, 16, dtype=dtype, requires_grad=True)
    k, v = (torch.ones(batch, seqlen_k, 2, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    out, lse = onepass.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros(batch, seqlen_q, 4, 16, dtype=dtype))
    assert torch.equal(lse, torch.full((batch, 4, seqlen_q), -torch.inf))
    for x, gradient in zip((q, k, v), torch.autograd.grad([out, lse], [q, k, v], [out, lse]), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))
    decoded, lse = onepass.attention_decode(q.detach(), k.detach(), v.detach(), return_lse=True, backend=backend)
    assert torch.equal(decoded, out.detach())
    assert torch.equal(lse, torch.full((batch, 4, seqlen_q), -torch.inf))


def test_rows_without_keys(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """causal with more queries than keys, and a sequence whose keys are all masked."""
    q, k, v = (x.requires_grad_() for x in qkv(generator, 30, 20, dtype))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    out, lse = onepass.attention(q, k, v, causal=True, key_mask=mask, return_lse=True, backend=backend)
    empty = torch.zeros(2, 30, dtype=torch.bool)
    empty[0, :10] = True
    empty[1] = True
    assert torch.equal((out == 0).all(-1).all(-1), empty)
    assert torch.equal(lse.isneginf(), empty[:, None].expand(2, 4, 30))
    do = normal(out.shape, dtype, "cpu", generator)
    dlse = torch.where(lse.isneginf(), torch.nan, 1.0)  # as the gradient of any function of -inf would be
    for gradient in torch.autograd.grad([out, lse], [q, k, v], [do, dlse]):
        assert gradient.isfinite().all()
        assert not gradient[1].any()


def test_lone_window_is_a_row_of_v(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator, 30, 30)
    out = onepass.attention(q, k, v, window_size=(0, 0), backend=backend)
    torch.testing.assert_close(out, v.repeat_interleave(2, 2), rtol=1e-6, atol=1e-6)


def test_windows_wider_than_everything_change_nothing(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    wide = onepass.attention(q, k, v, window_size=(2**62, 2**40), backend=backend)
    assert torch.equal(wide, onepass.attention(q, k, v, backend=backend))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nonfinite_inputs_reach_the_rows_that_see_them(
    fused: str, which: str, value: float, generator: torch.Generator
) -> None:
    inputs = dict(zip(("q", "k", "v"), qkv(generator), strict=True))
    inputs[which][1, 5, 1, 3] = value
    fused_out = onepass.attention(**inputs, backend=fused)
    expected = onepass.attention(**inputs, backend="reference")
    assert torch.equal(fused_out.isfinite(), expected.isfinite())
    assert fused_out[0].isfinite().all()


def assert_masked_keys_are_unread(backend: str, dtype: torch.dtype, generator: torch.Generator, garbage: float) -> None:
    q, k, v = qkv(generator, dtype=dtype)
    mask = torch.rand(2, 30, generator=generator) < 0.5
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    k[~mask], v[~mask] = garbage, garbage
    dirty = [x.requires_grad_() for x in (q, k, v)]
    expected = onepass.attention(*clean, key_mask=mask, backend=backend)
    out = onepass.attention(*dirty, key_mask=mask, backend=backend)
    assert torch.equal(out, expected)
    do = torch.randn(out.shape, generator=generator).to(dtype)
    for ours, theirs in zip(torch.autograd.grad(out, dirty, do), torch.autograd.grad(expected, clean, do), strict=True):
        assert torch.equal(ours, theirs)


def test_masked_keys_may_hold_anything_finite(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    assert_masked_keys_are_unread(backend, dtype, generator, 1e4)


def test_masked_keys_may_hold_nan(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    assert_masked_keys_are_unread(backend, dtype, generator, torch.nan)


def test_mask_of_any_strides(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    mask = torch.rand(30, 4, generator=generator).lt(0.5).T[::2]
    assert mask.stride() == (2, 4)
    expected = onepass.attention(q, k, v, key_mask=mask.contiguous(), backend=backend)
    assert torch.equal(onepass.attention(q, k, v, key_mask=mask, backend=backend), expected)


def test_outputs_are_fresh_and_contiguous(backend: str, generator: torch.Generator) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(generator))
    out, lse = onepass.attention(q, k, v, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones(()).expand(out.shape))
    for x in (out, lse, *gradients, *onepass.attention_decode(q, k, v, return_lse=True, backend=backend)):
        assert x.is_contiguous()
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


def test_gradients_of_any_strides(backend: str, generator: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(generator))
    out, lse = onepass.attention(q, k, v, return_lse=True, backend=backend)
    do = torch.randn(*out.shape[::-1], generator=generator).permute(3, 2, 1, 0)
    dlse = torch.randn(*lse.shape[::-1], generator=generator).permute(2, 1, 0)
    strided = torch.autograd.grad([out, lse], [q, k, v], [do, dlse], retain_graph=True)
    dense = torch.autograd.grad([out, lse], [q, k, v], [do.contiguous(), dlse.contiguous()])
    for ours, theirs in zip(strided, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_offsets_past_two_to_the_31(fused: str, generator: torch.Generator) -> None:
    """Views into 4.5 GB of address space, of which only the pages in use are ever touched."""
    small = qkv(generator, 40, 40, torch.bfloat16)
    far = torch.empty(2**31 + 2**27, dtype=torch.bfloat16)
    views = []
    for index, x in enumerate(small):
        heads, features = x.shape[2:]
        strides = (2**31, heads * features, features, 1)
        view = far.as_strided(x.shape, strides, index * 2**20)
        view.copy_(x)
        views.append(view.requires_grad_())
    expected_inputs = [x.requires_grad_() for x in small]
    expected = onepass.attention(*expected_inputs, causal=True, backend=fused)
    out = onepass.attention(*views, causal=True, backend=fused)
    assert torch.equal(out, expected)
    do = torch.randn(out.shape, generator=generator).to(out.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(out, views, do), torch.autograd.grad(expected, expected_inputs, do), strict=True
    ):
        assert torch.equal(ours, theirs)
    decoded = onepass.attention_decode(*(view.detach() for view in views), backend=fused)
    assert torch.equal(decoded, onepass.attention_decode(*(x.detach() for x in small), backend=fused))


def test_threads_change_nothing_but_rounding(fused: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    if fused != "cpu":
        pytest.skip("the threads are the CPU's")
    q, k, v = (x.requires_grad_() for x in qkv(generator, 200, 200, dtype))
    do = torch.randn(2, 200, 4, 24, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = onepass.attention(q, k, v, causal=True, backend=fused)
            results.append((out, *torch.autograd.grad(out, (q, k, v), do)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_inference_mode_and_parameters(backend: str, generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    expected = onepass.attention(q, k, v, backend=backend)
    with torch.inference_mode():
        assert torch.equal(onepass.attention(q, k, v, backend=backend), expected)
        assert torch.equal(onepass.attention(q.clone(), k, v, backend=backend), expected)
    parameters = [torch.nn.Parameter(x) for x in (q, k, v)]
    assert onepass.attention(*parameters, backend=backend).requires_grad


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("page_size", [None, 4])
def test_decode_of_queries_before_the_first_key(
    fused: str, length: int, splits: int, page_size: int | None, generator: torch.Generator
) -> None:
    """More queries than keys, in several tiles of rows: those of the first tile see nothing."""
    q, k, v = qkv(generator, 24, 64)
    lengths = torch.full((2,), length, dtype=torch.int32)
    options = {"cache_seqlens": lengths, "num_splits": splits, "return_lse": True}
    if page_size is not None:
        k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
        options["page_table"] = torch.arange(len(k), dtype=torch.int32).view(2, -1)
    out, lse = onepass.attention_decode(q, k, v, **options, backend=fused)
    expected, expected_lse = onepass.attention_decode(q, k, v, **options, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_pages_of_others_do_not_reach_rows_that_see_less(fused: str, generator: torch.Generator) -> None:
    """Keys after those that a tile of rows sees are not read from whichever page stands first."""
    q, k, v = qkv(generator, 24, 48)
    pages = [torch.cat((torch.full((1, 4, *x.shape[2:]), torch.nan), x[0].unflatten(0, (12, 4)))) for x in (k, v)]
    table = torch.arange(1, 13, dtype=torch.int32)[None]
    lengths = torch.tensor([44], dtype=torch.int32)
    out = onepass.attention_decode(q[:1], *pages, cache_seqlens=lengths, page_table=table, backend=fused)
    expected = onepass.attention_decode(q[:1], k[:1], v[:1], cache_seqlens=lengths, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("far", ["k_cache", "v_cache", "k_scale_shift", "v_scale_shift"])
def test_int4_groups_past_two_to_the_31(fused: str, far: str, generator: torch.Generator) -> None:
    """Views whose groups lie 2^30 elements apart, of which only the pages in use are ever touched."""
    q = normal((1, 1, 2, 8), torch.float32, "cpu", generator)
    inputs: dict[str, torch.Tensor] = {}
    for name in ("k", "v"):
        cache, pairs = onepass.quantize_kv_int4(normal((1, 40, 1, 8), torch.float32, "cpu", generator), groups=4)
        inputs |= {f"{name}_cache": cache, f"{name}_scale_shift": pairs}
    expected = onepass.attention_decode(q, **inputs, backend="reference")
    x, apart = inputs[far], 2**30 + 64
    unit = 1 if x.dim() == 4 else 2
    strides = (40 * unit, unit, 40 * unit, apart, 1)[: x.dim()]
    inputs[far] = torch.empty(3 * apart + 40 * unit, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)
    out = onepass.attention_decode(q, **inputs, backend=fused)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", ["plain", "int4"])
def test_alibi_beyond_fp32s_whole_numbers(fused: str, stored: str, generator: torch.Generator) -> None:
    """Distances near key 2^24 and beyond; a window's keys lie in the last pages of a long table."""
    size, length, pages = 64, 2**24 + 2**22 + 33, 3
    q = normal((1, 2, 2, 16), torch.float32, "cpu", generator)
    k, v = (normal((pages, size, 1, 16), torch.float32, "cpu", generator) for _ in range(2))
    options: dict[str, Any] = {"alibi_slopes": torch.tensor([0.1, 0.5]), "window_size": (40, -1), "return_lse": True}
    if stored == "int4":
        k, v, pairs = in_int4(k, v)
        options |= pairs
    table = torch.zeros(1, -(-length // size), dtype=torch.int32)
    table[0, -pages:] = torch.arange(pages)
    found, expected = (
        onepass.attention_decode(
            q, k, v, page_table=entries, cache_seqlens=torch.tensor([held], dtype=torch.int32), **options, backend=name
        )
        for entries, held, name in (
            (table, length, fused),
            (table[:, -pages:], length - (table.shape[1] - pages) * size, "reference"),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_int4_caches_of_any_strides(fused: str, device: str, generator: torch.Generator) -> None:
    """Bytes and pairs that do not lie next to each other, rows that are not a whole vector."""
    q = normal((2, 1, 4, 24), torch.float32, device, generator)
    k, v = (normal((2, 40, 2, 24), torch.float32, device, generator) for _ in range(2))
    (k_cache, k_pairs), (v_cache, v_pairs) = (onepass.quantize_kv_int4(x, groups=3) for x in (k, v))
    expected = onepass.attention_decode(
        q, k_cache, v_cache, k_scale_shift=k_pairs, v_scale_shift=v_pairs, backend="reference"
    )
    apart = torch.stack((k_cache, torch.full_like(k_cache, 255)), -1)[..., 0]
    heads_first = v_cache.transpose(1, 2).contiguous().transpose(1, 2)
    turned = k_pairs.transpose(3, 4).contiguous().transpose(3, 4)
    out = onepass.attention_decode(q, apart, heads_first, k_scale_shift=turned, v_scale_shift=v_pairs, backend=fused)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 2e-7, 6e4, 1e34])
@pytest.mark.parametrize("of", [torch.float32, torch.float16])
def test_int4_with_queries_of_any_size(
    fused: str, device: str, of: torch.dtype, size: float, generator: torch.Generator
) -> None:
    """Scores of ordinary size from queries of 0, subnormal in fp16, tiny and huge, beside ordinary ones."""
    q = normal((1, 2, 2, 32), torch.float32, device, generator)
    q[:, 1:] = q[:, 1:] * min(size, torch.finfo(of).max / 8)
    q = q.to(of)
    k, v = (normal((1, 300, 1, 32), of, device, generator) for _ in range(2))
    k, v, pairs = in_int4(k, v)
    scale = 1.0 if size == 0.0 else 1.0 / float(q[:, 1:].float().abs().max() or 1.0)
    out = onepass.attention_decode(q, k, v, **pairs, softmax_scale=scale, causal=False, backend=fused)
    exact = onepass.attention_decode(q.double(), k, v, **pairs, softmax_scale=scale, causal=False, backend="reference")
    eps = torch.finfo(of).eps
    torch.testing.assert_close(out[:, 1:].double(), exact[:, 1:], rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize(
    "sizes", [(1.0, 1.0), (1e-4, 1e-4), (3e-7, 3e-7), (1e-5, 1.0), (1.0, 1e-5), (0.0, 1e-5), (8e3, 8e3)]
)
@pytest.mark.parametrize("of", [torch.float32, torch.float16])
def test_int4_with_values_of_any_size(
    fused: str, device: str, of: torch.dtype, sizes: tuple[float, float], generator: torch.Generator
) -> None:
    """Of the first keys, and of those in later blocks; scales below fp16's normal numbers among them."""
    q, k, v = (normal((1, seqlen, 1, 32), torch.float32, device, generator) for seqlen in (4, 300, 300))
    v[:, :100] *= sizes[0]
    v[:, 100:] *= sizes[1]
    largest = float(v.abs().max())  # of what out sums
    k, v, pairs = in_int4(k.to(of), v.to(of))

    def out(backend: str, dtype: torch.dtype = of) -> Tensor:
        return onepass.attention_decode(q.to(of).to(dtype), k, v, **pairs, num_splits=1, backend=backend)

    found = numerics.compare("out", out(fused), out("reference", torch.float64), out("reference"), largest)
    numerics.assert_within_budget([found], backend=fused, sizes=sizes)


@pytest.mark.parametrize("seqlen_k", [64, 65, 129])
def test_gradients_where_every_score_is_far_below_zero(fused: str, seqlen_k: int, generator: torch.Generator) -> None:
    """exp(-lse) of a key that does not exist would be inf. Keys are alike, so the exact gradient of q is 0."""
    q, k = torch.ones(1, 20, 1, 16), torch.full((1, seqlen_k, 1, 16), -40.0)
    v, do = (normal((1, seqlen, 1, 16), torch.float32, "cpu", generator) for seqlen in (seqlen_k, 20))
    inputs = {"q": q, "k": k, "v": v, "do": do}
    terms = rounding_terms(inputs, {})

    def gradients(backend: str, of: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        leaves = [x.to(of).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(onepass.attention(*leaves, backend=backend), leaves, do.to(of))

    results = zip(
        ("dq", "dk", "dv"), gradients(fused), gradients("reference", torch.float64), gradients("reference"), strict=True
    )
    comparisons = [numerics.compare(name, *tensors, terms[name]) for name, *tensors in results]
    numerics.assert_within_budget(comparisons, backend=fused, seqlen_k=seqlen_k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("per_query", [True, False])
def test_biases_of_unseen_keys_may_be_anything(
    backend: str, dtype: torch.dtype, value: float, per_query: bool, generator: torch.Generator
) -> None:
    """They have no gradient, and change no other: with more keys than queries, neither may those of keys that only
    queries past the end would see.
    """
    q, k, v = qkv(generator, 33, 70, dtype)
    unseen = torch.arange(70) > torch.arange(33)[:, None] if per_query else torch.arange(70)[None] >= 33
    bias = normal((1, 4, *unseen.shape), dtype, "cpu", generator)
    do = normal((2, 33, 4, 24), dtype, "cpu", generator)
    found = []
    for hidden in (0.0, value):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, bias.masked_fill(unseen, hidden))]
        options = {"causal": True, "causal_alignment": "top_left", "backend": backend}
        out = onepass.attention(*leaves[:3], attn_bias=leaves[3], **options)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, do)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)
    assert not found[1][-1][..., unseen].any()
