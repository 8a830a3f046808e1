"""What must hold between calls: the same bits twice, batches, splits, prefill and decode, any pair of backends."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import onepass
from onepass.core import env
from onepass.ops.attention import kernels
from onepass.ops.attention.inputs import LAYOUTS, AttentionCase, DecodeCase
from onepass.testing import memory, numerics
from onepass.testing.inputs import normal

_OPTIONS = {"causal": True, "window_size": (40, -1)}
_PAIRS = list(itertools.permutations(kernels.FORWARD.usable, 2))


def draw(generator: torch.Generator, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(shape, dtype, "cpu", generator) for shape in shapes]


@pytest.mark.parametrize(("first", "second"), _PAIRS)
def test_any_backward_follows_any_forward(
    first: str, second: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = AttentionCase("mixed", seqlen_q=50, seqlen_k=70, nheads_q=4, causal=True, key_mask=True)
    inputs = case.inputs(dtype, "cpu", generator)
    q, k, v, do, dlse = (inputs[name] for name in ("q", "k", "v", "do", "dlse"))
    options = (None, None, None, inputs["key_mask"], None, case.head_dim**-0.5, -1, 0, True, 0.0, 0.0, False)
    out, lse = torch.ops.onepass.attention_fwd(q, k, v, *options, first)
    gradients = torch.ops.onepass.attention_bwd(do, dlse, q, k, v, out, lse, *options, True, True, False, False, second)
    oracle = case.call(numerics.in_double(inputs), "reference")
    reference = case.call(inputs, "reference")
    terms = case.terms(inputs)
    numerics.assert_within_budget(
        [
            numerics.compare(name, gradient, oracle[name], reference[name], terms.get(name, 0.0))
            for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=False)
        ],
        forward=first,
        backward=second,
    )


def test_the_same_bits_twice(backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    if env.triton_interpreted():
        pytest.skip("Triton's interpreter runs one program after the other")
    case = AttentionCase("twice", seqlen_q=300, seqlen_k=300, causal=True)
    inputs = case.inputs(dtype, "cpu", generator)
    first, second = (case.call(inputs, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_alone_is_the_row_in_the_batch(fused: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = AttentionCase("batch", batch=3, seqlen_q=65, seqlen_k=80, nheads_q=4, **_OPTIONS)
    inputs = case.inputs(dtype, "cpu", generator)
    whole = case.call(inputs, fused)
    for b in range(3):
        alone = case.call({name: x[b : b + 1] for name, x in inputs.items()}, fused)
        assert torch.equal(whole["out"][b : b + 1], alone["out"])
        assert torch.equal(whole["lse"][b : b + 1], alone["lse"])


def test_grouped_heads_are_repeated_heads(fused: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    q, k, v = draw(generator, (2, 33, 8, 32), (2, 33, 2, 32), (2, 33, 2, 32), dtype=dtype)
    grouped = onepass.attention(q, k, v, backend=fused)
    repeated = onepass.attention(q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2), backend=fused)
    torch.testing.assert_close(grouped, repeated)


def test_decode_is_the_last_row_of_prefill(fused: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    q, k, v = draw(generator, (2, 90, 8, 64), (2, 90, 2, 64), (2, 90, 2, 64), dtype=dtype)
    prefill, prefill_lse = onepass.attention(q, k, v, causal=True, return_lse=True, backend=fused)
    for last in (1, 3):
        out, lse = onepass.attention_decode(q[:, -last:], k, v, return_lse=True, backend=fused)
        eps = torch.finfo(dtype).eps  # two kernels, each a few roundings of terms as large as v from the exact value
        torch.testing.assert_close(out, prefill[:, -last:], rtol=0, atol=4 * eps * float(v.abs().max()))
        torch.testing.assert_close(lse, prefill_lse[:, :, -last:], rtol=1e-5, atol=1e-5)


def test_splits_do_not_change_the_result(fused: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    for splits in (1, 2, 5, 64):
        case = DecodeCase("splits", lengths=(300, 31), capacity=320, head_dim=64, num_splits=splits)
        numerics.assert_within_budget(
            numerics.compare_case(case, dtype, "cpu", generator, fused), num_splits=splits, backend=fused
        )


def test_merged_parts_are_the_whole(backend: str, generator: torch.Generator) -> None:
    """Over parts of the keys, one of them empty; out and the gradients, which pass through every part's lse."""
    q, k, v, do = draw(generator, (2, 20, 4, 16), (2, 60, 2, 16), (2, 60, 2, 16), (2, 20, 4, 16))
    dlse = normal((2, 4, 20), torch.float32, "cpu", generator)
    for x in (q, k, v):
        x.requires_grad_()
    whole = onepass.attention(q, k, v, return_lse=True, backend=backend)
    cuts = [(0, 17), (17, 17), (17, 60)]
    parts = [onepass.attention(q, k[:, a:b], v[:, a:b], return_lse=True, backend=backend) for a, b in cuts]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = onepass.merge_attention(outs, lses, backend=backend)
    for ours, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(whole, (q, k, v), (do, dlse))
    for ours, theirs in zip(torch.autograd.grad(merged, (q, k, v), (do, dlse)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_needed_gradients(backend: str, generator: torch.Generator) -> None:
    case = AttentionCase("all", causal=True)
    inputs = case.inputs(torch.float32, "cpu", generator)
    everything = case.call(inputs, backend)
    for wanted in (("q",), ("k",), ("v",), ("k", "v"), ("q", "v")):
        some = AttentionCase("some", causal=True, gradients=wanted).call(inputs, backend)
        assert set(some) == {"out", "lse", *(f"d{name}" for name in wanted)}
        assert all(torch.equal(some[name], everything[name]) for name in some)


def test_gradient_of_lse_alone(backend: str, generator: torch.Generator) -> None:
    """d lse / d q is softmax_scale times the weighted mean of the keys."""
    q, k, v = draw(generator, (1, 6, 2, 16), (1, 9, 2, 16), (1, 9, 2, 16))
    q.requires_grad_()
    _, lse = onepass.attention(q, k, v, return_lse=True, backend=backend)
    (dq,) = torch.autograd.grad(lse, q, torch.ones_like(lse))
    mean_key = onepass.attention(q.detach(), k, k, backend=backend)
    torch.testing.assert_close(dq, mean_key * 16**-0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seqlen", [4096])
def test_memory_does_not_grow_with_the_square(fused: str, seqlen: int, generator: torch.Generator) -> None:
    """One head's scores alone would take 64 MB."""
    if env.triton_interpreted():
        pytest.skip("Triton's interpreter takes minutes, and has no memory of a GPU's")
    q, k, v, do = draw(generator, *[(1, seqlen, 2, 16)] * 4)
    small = [x[:, :256].detach().requires_grad_() for x in (q, k, v)]
    whole = [x.requires_grad_() for x in (q, k, v)]

    def step(inputs: list[Tensor], gradient: Tensor) -> None:
        torch.autograd.grad(onepass.attention(*inputs, backend=fused), inputs, gradient)

    step(small, do[:, :256])
    assert memory.peak_bytes(lambda: step(whole, do)) < 16 << 20


_cases = st.builds(
    AttentionCase,
    name=st.just("drawn"),
    batch=st.integers(0, 3),
    seqlen_q=st.integers(0, 150),
    seqlen_k=st.integers(0, 150),
    nheads_q=st.sampled_from((4, 8)),
    nheads_kv=st.sampled_from((1, 2, 4)),
    head_dim=st.integers(1, 100),
    head_dim_v=st.none() | st.integers(1, 100),
    causal=st.booleans(),
    causal_alignment=st.sampled_from(("bottom_right", "top_left")),
    softmax_scale=st.none() | st.floats(-0.5, 0.5),
    window_size=st.tuples(st.integers(-1, 60), st.integers(-1, 60)),
    key_mask=st.booleans(),
    layout=st.sampled_from([layout for layout in LAYOUTS if layout != "packed"]),
)
# Triton's interpreter is slow, and computes bf16 wrongly.
_HALF = torch.float16 if env.triton_interpreted() else torch.bfloat16
_EXAMPLES = 10 if env.triton_interpreted() else 40
_quick = settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_quick
@given(case=_cases, draws=st.integers(0, 2**31), half=st.booleans())
def test_any_problem_is_within_budget(fused: str, case: AttentionCase, draws: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(draws)
    with numerics.nan_filled_memory():
        comparisons = numerics.compare_case(case, _HALF if half else torch.float32, "cpu", generator, fused)
    numerics.assert_within_budget(comparisons, case=case, backend=fused, draws=draws)


_decode_cases = st.builds(
    DecodeCase,
    name=st.just("drawn"),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4).map(tuple),
    seqlen_q=st.integers(1, 6),
    capacity=st.integers(200, 230),
    nheads_q=st.sampled_from((4, 8, 12)),
    nheads_kv=st.sampled_from((1, 2, 4)),
    head_dim=st.integers(1, 130),
    head_dim_v=st.none() | st.integers(1, 130),
    causal=st.booleans(),
    window_size=st.tuples(st.integers(-1, 60), st.integers(-1, 3)),
    num_splits=st.none() | st.integers(1, 9),
    heads_first=st.booleans(),
)


@_quick
@given(case=_decode_cases, draws=st.integers(0, 2**31), half=st.booleans())
def test_any_decode_is_within_budget(fused: str, case: DecodeCase, draws: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(draws)
    dtype = _HALF if half else torch.float32
    numerics.assert_within_budget(
        numerics.compare_case(case, dtype, "cpu", generator, fused), case=case, backend=fused, draws=draws
    )


def test_some_backend_is_fused() -> None:
    """The tests above would otherwise all be skipped."""
    assert len(kernels.FORWARD.usable) >= 2
