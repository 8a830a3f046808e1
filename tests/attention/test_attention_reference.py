"""The reference against definitions that share no code with it: loops over rows, PyTorch's autograd, known answers."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass.core import kv_formats
from onepass.ops.attention import reference
from onepass.ops.attention.inputs import CASES, AttentionCase, DecodeCase
from onepass.testing import numerics

_ATTENTION_CASES = [case for case in CASES if isinstance(case, AttentionCase)]


def by_rows(case: AttentionCase, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One (batch, head, query) at a time, differentiable: out and lse as the conventions define them."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    batch, seqlen_q, nheads_q, _ = q.shape
    group = nheads_q // k.shape[2]
    keep = torch.ones(batch, nheads_q, seqlen_q, k.shape[1])
    if case.dropout_p:
        keep = reference.dropout_keep(inputs["rng_state"], case.dropout_p, keep.shape)
    outs, lses = [], []
    for b, h, i in itertools.product(range(batch), range(nheads_q), range(seqlen_q)):
        row = row_of_scores(case, inputs, b, h, i)
        seen = seen_keys(case, inputs, b, i) & (row.detach() > -math.inf)
        s = row[seen]
        logits = torch.cat([s, inputs["attn_sink"][h : h + 1]]) if case.sink else s
        if len(logits) == 0:
            outs.append(v.new_zeros(v.shape[-1]))
            lses.append(v.new_tensor(-math.inf))
            continue
        lse = torch.logsumexp(logits, 0)
        p = torch.exp(s - lse) * keep[b, h, i][seen] / (1 - case.dropout_p)
        outs.append(p @ v[b, seen, h // group])
        lses.append(lse)
    rows = (batch, nheads_q, seqlen_q)
    return torch.stack(outs).view(*rows, -1).transpose(1, 2), torch.stack(lses).view(rows)


def row_of_scores(case: AttentionCase, inputs: dict[str, Tensor], b: int, h: int, i: int) -> Tensor:
    """In the order scale, softcap, ALiBi, bias."""
    q, k = inputs["q"], inputs["k"]
    keys = k[b, :, h // (q.shape[2] // k.shape[2])]
    scale = q.shape[3] ** -0.5 if case.softmax_scale is None else case.softmax_scale
    s = scale * (keys * q[b, i, h]).sum(-1)
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    if case.alibi:
        s = s - inputs["alibi_slopes"][b, h].double() * (i + shift_of(case) - torch.arange(case.seqlen_k)).abs()
    if case.bias is not None:
        s = s + inputs["attn_bias"].expand(case.batch, case.nheads_q, case.seqlen_q, case.seqlen_k)[b, h, i]
    return s


def seen_keys(case: AttentionCase, inputs: dict[str, Tensor], b: int, i: int) -> Tensor:
    left, right = case.window_size
    place, j = i + shift_of(case), torch.arange(case.seqlen_k)
    seen = inputs["key_mask"][b].clone() if case.key_mask else torch.ones(case.seqlen_k, dtype=torch.bool)
    if case.causal:
        seen &= j <= place
    if left >= 0:
        seen &= j >= place - left
    if right >= 0:
        seen &= j <= place + right
    return seen


def shift_of(case: AttentionCase) -> int:
    return case.seqlen_k - case.seqlen_q if case.causal_alignment == "bottom_right" else 0


@pytest.mark.parametrize("case", _ATTENTION_CASES, ids=lambda case: case.name)
def test_forward_and_gradients_follow_the_definition(case: AttentionCase, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, "cpu", generator)
    if 0 in (inputs["q"].numel(), inputs["k"].numel()) or case.batch * case.nheads_q * case.seqlen_q > 700:
        pytest.skip("empty, or long for a loop")
    ours = case.call(inputs, "reference")
    names = [name for name in ("q", "k", "v", "attn_bias", "attn_sink") if name in inputs]
    used = {name: x.detach().clone().requires_grad_(name in names) for name, x in inputs.items()}
    out, lse = by_rows(case, used)
    finite = torch.isfinite(lse)
    total = (out * inputs["do"]).sum() + (lse[finite] * inputs["dlse"][finite]).sum()
    theirs = {"out": out, "lse": lse}
    found = torch.autograd.grad(total, [used[name] for name in names], allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        theirs[f"d{name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected.detach(), rtol=1e-9, atol=1e-11 * max(1, case.amplitude))


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_sdpa(causal: bool, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 3, 19, 24, dtype=torch.float64, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out = onepass.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, backend="reference")
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_philox_known_answers() -> None:
    """Random123's vectors for philox4x32-10."""

    def words(*values: int) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(value) for value in values)

    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        k0, k1 = words(*key)
        assert tuple(int(word) for word in reference.philox(words(*counter), (k0, k1))) == expected


def test_dropout_keeps_the_right_share(generator: torch.Generator) -> None:
    state = torch.randint(0, 2**62, (2,), generator=generator)
    keep = reference.dropout_keep(state, 0.25, (2, 3, 200, 201))
    assert abs(keep.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / keep.numel()) ** 0.5
    assert torch.equal(keep, reference.dropout_keep(state, 0.25, (2, 3, 200, 201)))
    assert not torch.equal(keep, reference.dropout_keep(state + torch.tensor([0, 1]), 0.25, (2, 3, 200, 201)))
    assert torch.equal(keep[:1, :, :7, :9], reference.dropout_keep(state, 0.25, (1, 3, 7, 9)))


def test_dropout_of_everything_and_of_nothing(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8, generator=generator) for _ in range(3))
    assert torch.equal(onepass.attention(q, k, v, dropout_p=1.0, backend="reference"), torch.zeros(1, 5, 2, 8))
    plain = onepass.attention(q, k, v, backend="reference")
    assert torch.equal(onepass.attention(q, k, v, dropout_p=0.0, generator=generator, backend="reference"), plain)


def test_dropout_draws_from_the_generator(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 9, 2, 8, generator=generator) for _ in range(3))
    again = torch.Generator().set_state(generator.get_state())
    first = onepass.attention(q, k, v, dropout_p=0.5, generator=generator, backend="reference")
    assert torch.equal(first, onepass.attention(q, k, v, dropout_p=0.5, generator=again, backend="reference"))
    assert not torch.equal(first, onepass.attention(q, k, v, dropout_p=0.5, generator=again, backend="reference"))


_DECODE_CASES = [case for case in CASES if isinstance(case, DecodeCase) and not (case.cache_dtype or case.groups)]


@pytest.mark.parametrize("case", _DECODE_CASES, ids=lambda case: case.name)
def test_decode_is_attention_over_the_stored_keys(case: DecodeCase, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float64, "cpu", generator)
    got = case.call(inputs, "reference")
    lengths = case.lengths or (case.capacity,) * 2
    for b, length in enumerate(lengths):
        k, v = (_stored(inputs, name, b, length, case.page_size) for name in ("k_cache", "v_cache"))
        options = case.options(inputs)
        for name in ("cache_seqlens", "page_table", "num_splits"):
            options.pop(name, None)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = options["alibi_slopes"][b : b + 1]
        out, lse = onepass.attention(inputs["q"][b : b + 1], k, v, **options, return_lse=True, backend="reference")
        torch.testing.assert_close(got["out"][b : b + 1], out)
        torch.testing.assert_close(got["lse"][b : b + 1], lse)


def _stored(inputs: dict[str, Tensor], name: str, b: int, length: int, page_size: int | None) -> Tensor:
    if page_size is None:
        return inputs[name][b : b + 1, :length]
    pages = [inputs[name][int(page)] for page in inputs["page_table"][b] if page >= 0]
    return torch.cat([*pages, inputs[name][0, :0]])[None, :length]


def test_decode_descales_quantised_caches(generator: torch.Generator) -> None:
    q = torch.randn(2, 1, 4, 16, generator=generator)
    codes = [torch.randint(-127, 128, (2, 10, 2, 16), dtype=torch.int8, generator=generator) for _ in range(2)]
    scales = [torch.rand((2, 2), generator=generator) / 50 for _ in range(2)]
    k, v = (code * scale[:, None, :, None] for code, scale in zip(codes, scales, strict=True))
    out = onepass.attention_decode(q, *codes, k_descale=scales[0], v_descale=scales[1], backend="reference")
    torch.testing.assert_close(out, onepass.attention_decode(q, k, v, backend="reference"))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_decode_of_int4_is_decode_of_its_numbers(groups: tuple[int, int], generator: torch.Generator) -> None:
    """Byte by byte: the even feature in the low nibble, each group's own scale and shift."""
    q = torch.randn(2, 1, 4, 16, generator=generator)
    packed = [torch.randint(0, 256, (2, 10, 2, 8), dtype=torch.uint8, generator=generator) for _ in range(2)]
    pairs = [torch.randn(2, 10, 2, count, 2, generator=generator).half() for count in groups]
    numbers = [torch.empty(2, 10, 2, 16) for _ in range(2)]
    for x, code, pair, count in zip(numbers, packed, pairs, groups, strict=True):
        for feature in range(16):
            nibble = code[..., feature // 2] >> (4 * (feature % 2)) & 15
            scale, shift = pair[..., feature * count // 16, :].float().unbind(-1)
            x[..., feature] = nibble * scale + shift
    out = onepass.attention_decode(q, *packed, k_scale_shift=pairs[0], v_scale_shift=pairs[1], backend="reference")
    torch.testing.assert_close(out, onepass.attention_decode(q, *numbers, backend="reference"))


def test_int4_is_half_a_step_off_at_most(generator: torch.Generator) -> None:
    x = torch.randn(3, 5, 2, 48, generator=generator) * 7
    for groups in (1, 2, 4, 24):
        packed, pairs = onepass.quantize_kv_int4(x, groups=groups)
        assert (packed.shape, pairs.shape) == ((3, 5, 2, 24), (3, 5, 2, groups, 2))
        error = (kv_formats.dequantize_int4(packed, pairs) - x).abs().unflatten(-1, (groups, -1)).amax(-1)
        assert (error <= 0.52 * pairs[..., 0].float() + 0.002 * x.abs().max()).all()
    with pytest.raises(ValueError, match=r"groups must divide head_dim / 2 = 24, got 5"):
        onepass.quantize_kv_int4(x, groups=5)
    with pytest.raises(ValueError, match=r"even head_dim, got \(3, 5, 2, 47\)"):
        onepass.quantize_kv_int4(x[..., :47])
    with pytest.raises(TypeError, match=r"x must be floating point"):
        onepass.quantize_kv_int4(x.int())


def test_budget_measures_the_reference_itself(dtype: torch.dtype, generator: torch.Generator) -> None:
    """The reference in a kernel's dtype is within its own budget by construction; its error is that of the dtype."""
    case = AttentionCase("plain")
    comparisons = {c.tensor: c for c in numerics.compare_case(case, dtype, "cpu", generator, "reference")}
    numerics.assert_within_budget(list(comparisons.values()))
    eps = torch.finfo(dtype).eps
    assert 0.05 * eps < comparisons["out"].error[0] < 10 * eps
