"""The four steps against the definition in fp64, within the error budget, on every layout and tile size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass.lab import STEPS, attention_step, attention_step_and_memory
from onepass.testing import numerics

STEP = pytest.mark.parametrize("step", STEPS)


def draw(seed, batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v=None, amplitude=1.0):
    """q, k, v in fp32; amplitude is that of q, so of the scores."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, seqlen_q, nheads_q, head_dim, generator=generator) * amplitude
    k = torch.randn(batch, seqlen_k, nheads_kv, head_dim, generator=generator)
    v = torch.randn(batch, seqlen_k, nheads_kv, head_dim_v or head_dim, generator=generator)
    return q, k, v


def definition(q, k, v, causal, softmax_scale):
    return onepass.attention(q, k, v, causal=causal, softmax_scale=softmax_scale, backend="reference")


def check(q, k, v, step, causal=False, softmax_scale=None, **blocks):
    """Inputs lie between NaN and must survive; all of the output must be written."""
    inputs = [numerics.guarded(x) for x in (q, k, v)]
    with numerics.nan_filled_memory():
        out = attention_step(
            *(x.tensor for x in inputs), step=step, causal=causal, softmax_scale=softmax_scale, **blocks
        )
    assert out.is_contiguous()
    assert all(x.intact() for x in inputs)
    oracle = definition(q.double(), k.double(), v.double(), causal, softmax_scale)
    # p is exp(score - maximum): what rounding takes from a score, p loses relative to itself.
    options = {"causal": causal, "softmax_scale": softmax_scale, "return_lse": True, "backend": "reference"}
    summed, lse = onepass.attention(q.double(), k.double(), v.double().abs(), **options)
    sizes = summed * (1.0 + lse.abs().nan_to_num(posinf=0.0)).transpose(1, 2).unsqueeze(-1)
    terms = float(sizes.max()) if sizes.numel() else 0.0
    comparison = numerics.compare("out", out, oracle, definition(q, k, v, causal, softmax_scale), terms)
    numerics.assert_within_budget([comparison], step=step, causal=causal, softmax_scale=softmax_scale, blocks=blocks)
    return out


BLOCKS = st.one_of(st.none(), st.integers(1, 9), st.sampled_from([16, 17, 33, 64, 100, 4096]))


@settings(max_examples=150, deadline=None)
@given(
    step=st.sampled_from(STEPS),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    seqlen_q=st.one_of(st.integers(0, 20), st.integers(21, 150)),
    seqlen_k=st.one_of(st.integers(0, 20), st.integers(21, 150)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (7, 7)]),
    head_dim=st.integers(1, 80),
    head_dim_v=st.one_of(st.none(), st.integers(1, 80)),
    causal=st.booleans(),
    softmax_scale=st.sampled_from([None, 1.0, 0.0, -0.3]),
    block_q=BLOCKS,
    block_k=BLOCKS,
)
def test_any_problem(
    step, seed, batch, seqlen_q, seqlen_k, heads, head_dim, head_dim_v, causal, softmax_scale, block_q, block_k
):
    tensors = draw(seed, batch, seqlen_q, seqlen_k, *heads, head_dim, head_dim_v)
    check(*tensors, step, causal, softmax_scale, block_q=block_q, block_k=block_k)


@STEP
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "head_dim"),
    [
        (1, 1, 1),
        (1, 1000, 32),
        (257, 255, 33),
        (64, 300, 40),
        (300, 64, 72),
        (130, 130, 96),
        (65, 65, 160),
        (40, 90, 256),
    ],
)
def test_shapes(step, seqlen_q, seqlen_k, head_dim, causal, seed):
    check(*draw(seed, 2, seqlen_q, seqlen_k, 2, 2, head_dim), step, causal)


@STEP
@pytest.mark.parametrize(
    "blocks", [(1, 1), (1, 300), (300, 1), (3, 5), (16, 16), (48, 64), (127, 129), (128, 512), (10**6, 10**9)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_any_size(step, blocks, causal, seed):
    check(*draw(seed, 1, 130, 120, 2, 1, 20), step, causal, block_q=blocks[0], block_k=blocks[1])


@STEP
@pytest.mark.parametrize("seqlen_k", [4096, 10000])
def test_long_sequences_stay_within_the_budget(step, seqlen_k, seed):
    check(*draw(seed, 1, 50, seqlen_k, 1, 1, 32), step)


@STEP
@pytest.mark.parametrize("amplitude", [1e-20, 1e3, 1e18])
def test_scores_of_any_size(step, amplitude, seed):
    """exp(score) alone would overflow from 89 on; without the maximum subtracted the result would be NaN."""
    q, k, v = draw(seed, 1, 40, 70, 2, 2, 24, amplitude=amplitude)
    assert check(q, k, v, step).isfinite().all()


@STEP
def test_one_key_far_above_all_others_takes_all_the_weight(step):
    q, k, v = draw(0, 1, 5, 200, 1, 1, 16)
    q[:] = 1.0
    k[:] = 0.0
    k[:, 150] = 1e30
    torch.testing.assert_close(attention_step(q, k, v, step=step), v[:, 150:151].expand(1, 5, 1, 16), rtol=1e-6, atol=0)


def views(x):
    """The same numbers in other memory layouts, by name; features stay next to one another."""
    batch, seqlen, heads, dim = x.shape
    packed = torch.full((batch, seqlen, 3, heads, dim), torch.nan)
    packed[:, :, 1] = x
    wide = torch.full((batch, seqlen + 5, heads + 2, dim + 3), torch.nan)
    wide[:, 2 : seqlen + 2, 1 : heads + 1, 3:] = x
    return {
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "sequence first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "packed": packed[:, :, 1],
        "sliced": wide[:, 2 : seqlen + 2, 1 : heads + 1, 3:],
    }


@STEP
@pytest.mark.parametrize("layout", ["heads first", "sequence first", "packed", "sliced"])
@pytest.mark.parametrize("causal", [False, True])
def test_views_are_read_in_place(step, layout, causal, seed):
    tensors = draw(seed, 2, 37, 53, 3, 3, 20)
    expected = attention_step(*tensors, step=step, causal=causal)
    out = attention_step(*(views(x)[layout] for x in tensors), step=step, causal=causal)
    assert torch.equal(out, expected)


@STEP
def test_expanded_views(step, seed):
    q, k, v = draw(seed, 1, 20, 30, 1, 1, 16)
    q, k, v = q.expand(3, 20, 4, 16), k.expand(3, 30, 2, 16), v.expand(3, 30, 2, 16)
    check(q, k, v, step)


@STEP
def test_a_cache_that_is_partly_filled(step, seed):
    """Keys past the filled part are NaN and must not be reached: one query after another, as when text is written."""
    q, k, v = draw(seed, 2, 12, 12, 2, 2, 32)
    whole = attention_step(q, k, v, step=step, causal=True)
    caches = [torch.full((2, 64, 2, 32), torch.nan) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:, :12] = x
    for i in range(12):
        filled = (cache[:, : i + 1] for cache in caches)
        out = attention_step(q[:, i : i + 1], *filled, step=step, causal=True)
        torch.testing.assert_close(out[:, 0], whole[:, i], rtol=1e-5, atol=1e-6)


@STEP
def test_rows_without_keys_give_zero(step, seed):
    q, k, v = draw(seed, 1, 9, 4, 2, 2, 8)
    out = attention_step(q, k, v, step=step, causal=True, block_q=3)
    assert (out[:, :5] == 0).all()
    assert (out[:, 5:] != 0).all()


@STEP
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 3, 4, 2, 2, 8),
        (1, 0, 4, 2, 2, 8),
        (1, 3, 0, 2, 2, 8),
        (0, 0, 0, 1, 1, 1),
        (1, 0, 0, 1, 1, 1),
        (2, 3, 4, 0, 2, 8),
    ],
)
def test_zero_lengths(step, causal, sizes):
    q, k, v = draw(0, *sizes)
    with numerics.nan_filled_memory():
        out, memory = attention_step_and_memory(q, k, v, step=step, causal=causal)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert (out == 0).all()
    assert memory == 0


@STEP
def test_no_value_features(step):
    q, k, _ = draw(0, 1, 3, 4, 2, 2, 8)
    assert attention_step(q, k, torch.zeros(1, 4, 2, 0), step=step).shape == (1, 3, 2, 0)


@STEP
def test_nan_stays_in_its_row(step, seed):
    q, k, v = draw(seed, 1, 20, 30, 2, 2, 16)
    clean = attention_step(q, k, v, step=step)
    q[0, 7, 1, 3] = torch.nan
    out = attention_step(q, k, v, step=step)
    assert out[0, 7, 1].isnan().all()
    clean[0, 7, 1] = out[0, 7, 1] = 0.0
    assert torch.equal(out, clean)


@STEP
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_twice_and_on_any_number_of_threads(step, causal, seed):
    tensors = draw(seed, 2, 70, 90, 3, 1, 40)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(attention_step(*tensors, step=step, causal=causal))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_working_memory_is_what_each_step_promises():
    q, k, v = draw(0, 1, 1024, 1024, 4, 4, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        memory = {step: attention_step_and_memory(q, k, v, step=step)[1] for step in STEPS}
        longer = draw(0, 1, 2048, 2048, 1, 1, 32)
        flash = attention_step_and_memory(*longer, step="flash")[1]
    finally:
        torch.set_num_threads(before)
    assert memory["naive"] == memory["blocked"] == 4 * 1024 * 1024  # the scores of one head
    assert memory["fused"] == 2 * 4 * 4 * 1024  # threads x rows x 4 bytes x keys
    assert memory["flash"] < 64 * 1024
    assert flash == memory["flash"]  # does not grow with the length


@STEP
@pytest.mark.parametrize("fault", ["last key dropped", "mask off by one", "no scale", "last row not written"])
def test_a_fault_is_noticed(step, fault, monkeypatch):
    """The checks of this file must be able to fail."""
    right = attention_step

    def wrong(q, k, v, causal, **options):
        if fault == "no scale":
            return right(q, k, v, causal=causal, **options | {"softmax_scale": 1.0})
        if fault == "mask off by one":
            return right(torch.cat([q, q[:, :1]], dim=1), k, v, causal=True, **options)[:, :-1].contiguous()
        if fault == "last key dropped":
            return right(q, k[:, :-1], v[:, :-1], causal=causal, **options)
        out = torch.empty_like(q)
        out[:, :-1] = right(q, k, v, causal=causal, **options)[:, :-1]
        return out

    problem = draw(0, 1, 20, 33, 2, 2, 16)
    causal = fault == "mask off by one"
    check(*problem, step, causal)
    monkeypatch.setitem(globals(), "attention_step", wrong)
    with pytest.raises(AssertionError):
        check(*problem, step, causal)
