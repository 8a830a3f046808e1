"""rope: against its definition by complex numbers, layouts, positions, bad input, planted faults."""

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.ops.rope import kernels
from onepass.ops.rope.inputs import RopeCase
from onepass.testing import conformance


def qk(generator: torch.Generator, device: str, seqlen: int = 9, head_dim: int = 16) -> list[Tensor]:
    return [torch.randn(2, seqlen, heads, head_dim, generator=generator).to(device) for heads in (4, 2)]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2 i, 2 i + 1) as complex numbers, turned by cos + i sin: as Meta's Llama does it."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double()).unsqueeze(-2)).flatten(-2).to(x.dtype)


def test_interleaved_is_a_complex_product(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = qk(generator, device)
    cos, sin = onepass.rope_table(16, 9, device=device)
    for ours, x in zip(onepass.rope(q, k, cos, sin, interleaved=True, backend=backend), (q, k), strict=True):
        torch.testing.assert_close(ours, turned(x, cos, sin))


def test_halves_are_pairs_in_another_order(backend: str, device: str, generator: torch.Generator) -> None:
    """Feature i and i + rotary_dim / 2 turn as features 2 i and 2 i + 1 do, and as Hugging Face's rotate_half."""
    q, k = qk(generator, device)
    cos, sin = onepass.rope_table(16, 9, device=device)
    order = torch.arange(16, device=device).view(8, 2).T.flatten()  # the evens, then the odds
    halves = onepass.rope(q[..., order], k[..., order], cos, sin, backend=backend)
    pairs = onepass.rope(q, k, cos, sin, interleaved=True, backend=backend)
    for a, b in zip(halves, pairs, strict=True):
        torch.testing.assert_close(a, b[..., order])
    wide_cos, wide_sin = (torch.cat((x, x), -1).unsqueeze(1) for x in (cos, sin))
    rotate_half = torch.cat((-q[..., 8:], q[..., :8]), -1)
    ours, _ = onepass.rope(q, k, cos, sin, backend=backend)
    torch.testing.assert_close(ours, q * wide_cos + rotate_half * wide_sin)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(
    backend: str, device: str, interleaved: bool, generator: torch.Generator
) -> None:
    q, k = (torch.randn(1, 1, 1, 32, generator=generator).to(device).expand(1, 40, 1, 32) for _ in range(2))
    cos, sin = onepass.rope_table(32, 40, device=device)
    q, k = onepass.rope(q, k, cos, sin, interleaved=interleaved, backend=backend)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in (0, 3, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1  # it does depend on that


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_is_the_inverse_rotation(
    backend: str, device: str, interleaved: bool, generator: torch.Generator
) -> None:
    q, k = (x.requires_grad_() for x in qk(generator, device))
    cos, sin = onepass.rope_table(12, 9, device=device)
    out = onepass.rope(q, k, cos, sin, interleaved=interleaved, backend=backend)
    back = torch.autograd.grad(out, (q, k), tuple(x.detach() for x in out))
    for x, original in zip(back, (q, k), strict=True):
        torch.testing.assert_close(x, original)
    assert not torch.allclose(out[0], q)


def test_one_gradient_alone(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = (x.requires_grad_() for x in qk(generator, device))
    cos, sin = onepass.rope_table(16, 9, device=device)
    out = onepass.rope(q, k, cos, sin, backend=backend)
    douts = [torch.randn(x.shape, generator=generator).to(device) for x in out]
    both = torch.autograd.grad(out, (q, k), douts, retain_graph=True)
    for i, x in enumerate((q, k)):
        (alone,) = torch.autograd.grad(out[i], x, douts[i], retain_graph=True)
        assert torch.equal(alone, both[i])
    out = onepass.rope(q.detach(), k, cos, sin, backend=backend)
    assert torch.equal(torch.autograd.grad(out, k, douts)[0], both[1])
    (other,) = torch.autograd.grad(onepass.rope(q, k, cos, sin, backend=backend)[0], k, douts[0], allow_unused=True)
    assert other is None or not other.any()


def test_second_derivatives(generator: torch.Generator) -> None:
    q, k = (x.double().requires_grad_() for x in qk(generator, "cpu", 3, 4))
    cos, sin = (x.double() for x in onepass.rope_table(4, 3))

    def rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return onepass.rope(q, k, cos, sin, backend="reference")

    assert torch.autograd.gradcheck(rope, (q, k))
    assert torch.autograd.gradgradcheck(rope, (q, k))


def test_features_past_rotary_dim_keep_their_bits(
    fused: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    q, k = (x.to(dtype) for x in qk(generator, device))
    q[0, 0, 0, 13], k[1, 2, 0, 15] = torch.nan, torch.inf
    for interleaved in (False, True):
        out = onepass.rope(q, k, *onepass.rope_table(12, 9, device=device), interleaved=interleaved, backend=fused)
        for ours, x in zip(out, (q, k), strict=True):
            assert torch.equal(
                ours[..., 12:].contiguous().view(torch.uint8), x[..., 12:].contiguous().view(torch.uint8)
            )
            assert ours[..., :12].isfinite().all()


def test_token_alone_is_the_token_in_a_batch(
    fused: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    q, k = (x.to(dtype) for x in qk(generator, device))
    cos, sin = onepass.rope_table(16, 9, device=device)
    whole = onepass.rope(q, k, cos, sin, backend=fused)
    for i in (0, 4, 8):
        alone = onepass.rope(q[1:, i : i + 1], k[1:, i : i + 1], cos[i : i + 1], sin[i : i + 1], backend=fused)
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[1:, i : i + 1])


def test_positions_in_every_form_are_the_same(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = qk(generator, device)
    cos, sin = onepass.rope_table(16, 50, device=device)
    ids = torch.randint(0, 50, (2, 9), generator=generator).to(device)
    by_id = onepass.rope(q, k, cos, sin, position_ids=ids, backend=backend)
    per_batch = onepass.rope(q, k, *onepass.rope_table(16, position_ids=ids, device=device), backend=backend)
    looked_up = onepass.rope(q, k, cos[ids], sin[ids], backend=backend)
    apart = [onepass.rope(q[i : i + 1], k[i : i + 1], cos[ids[i]], sin[ids[i]], backend=backend) for i in (0, 1)]
    narrow = onepass.rope(q, k, cos, sin, position_ids=ids.int().T.contiguous().T, backend=backend)
    for i in (0, 1):
        assert torch.equal(by_id[i], looked_up[i])
        assert torch.equal(by_id[i], per_batch[i])
        assert torch.equal(by_id[i], narrow[i])
        assert torch.equal(by_id[i], torch.cat([pair[i] for pair in apart]))


def test_unusual_tables(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = qk(generator, device)
    cos, sin = onepass.rope_table(16, 9, device=device)
    both = torch.stack((cos, sin), -1)
    expected = onepass.rope(q, k, cos, sin, backend=backend)
    for tables in (both.unbind(-1), (cos.expand(2, 9, 8), sin.expand(2, 9, 8)), (cos.T.contiguous().T, sin)):
        for a, b in zip(onepass.rope(q, k, *tables, backend=backend), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("outside", [-1, 9, 2**40])
def test_position_outside_the_table_is_an_error(
    backend: str, device: str, outside: int, generator: torch.Generator
) -> None:
    if device != "cpu":
        pytest.skip("nobody waits for a GPU's positions: the next test")
    q, k = qk(generator, device)
    ids = torch.arange(9, device=device).repeat(2, 1)
    ids[1, 3] = outside
    with pytest.raises((ValueError, IndexError), match="position_ids"):
        onepass.rope(q, k, *onepass.rope_table(16, 9, device=device), position_ids=ids, backend=backend)


def test_position_that_cannot_be_read_gives_nan(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """What a GPU does, where nothing waits for the values: no read outside, and the fault shows."""
    if backend == "cpu":
        pytest.skip("its kernel looks at the positions itself")
    module = importlib.import_module(f"onepass.ops.rope.{'triton.fwd' if backend == 'triton' else 'reference'}")
    monkeypatch.setattr(module, "require_positions_in_table", lambda position_ids, cos: None)
    q, k = qk(generator, device)
    table = onepass.rope_table(12, 9, device=device)
    ids = torch.arange(9, device=device).repeat(2, 1)
    expected = onepass.rope(q, k, *table, position_ids=ids, backend=backend)
    ids[1, 3], ids[0, 2] = 9, -1
    for ours, wanted in zip(onepass.rope(q, k, *table, position_ids=ids, backend=backend), expected, strict=True):
        wanted[1, 3, :, :12] = torch.nan
        wanted[0, 2, :, :12] = torch.nan
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st() -> None:
    q = torch.zeros(1, 2**15 + 3, 512, 128, dtype=torch.float16, device="cuda")
    q[0, -1] = 1.0
    k = q[:, :, -1:]
    table = onepass.rope_table(128, q.shape[1], device="cuda")
    ends = onepass.rope(q[:, -1:], k[:, -1:], *(x[-1:] for x in table), backend="reference")
    q_out, k_out = onepass.rope(q, k, *table, backend="triton")
    torch.testing.assert_close(q_out[:, -1:], ends[0])
    torch.testing.assert_close(k_out[:, -1:], ends[1])


Q, K = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
COS, SIN = torch.ones(9, 8), torch.zeros(9, 8)
IDS = torch.zeros(2, 9, dtype=torch.int64)


def call(**changes: Any) -> Callable[[], Any]:
    return lambda: onepass.rope(**({"q": Q, "k": K, "cos": COS, "sin": SIN} | changes))


BAD = {
    "integers": (call(q=Q.int(), k=K.int()), TypeError, "q must be floating point, got int32 (2, 9, 4, 16)"),
    "q's dimensions": (call(q=Q[0]), ValueError, "q must be (batch, seqlen, nheads_q, head_dim), got (9, 4, 16)"),
    "k's length": (call(k=K[:, :8]), ValueError, "k must be (batch, seqlen, nheads_kv, head_dim) = (2, 9, any, 16)"),
    "k's head_dim": (call(k=K[..., :8]), ValueError, "= (2, 9, any, 16) as q, got (2, 9, 2, 8)"),
    "k's dtype": (call(k=K.half()), TypeError, "k must have q's dtype float32, got float16 (2, 9, 2, 16)"),
    "k's device": (call(k=K.to("meta")), ValueError, "k must be on q's device cpu"),
    "table too short": (call(cos=COS[:8], sin=SIN[:8]), ValueError, "must be (9, 8) for q (2, 9, 4, 16), got (8, 8)"),
    "table too long": (
        call(cos=COS.repeat(2, 1), sin=SIN.repeat(2, 1)),
        ValueError,
        "got (18, 8): cut a longer table to cos[start : start + seqlen], or give position_ids",
    ),
    "table of another batch": (
        call(cos=COS.repeat(3, 1, 1), sin=SIN.repeat(3, 1, 1)),
        ValueError,
        "must be (2, 9, 8) for q",
    ),
    "table with repeated columns": (
        call(cos=COS.repeat(1, 2), sin=SIN.repeat(1, 2)),
        ValueError,
        "at most head_dim 16: got (9, 16), a rotary_dim of 32 (tables that repeat their columns are cut",
    ),
    "empty table": (call(cos=COS[:, :0], sin=SIN[:, :0]), ValueError, "rotary_dim / 2), got (9, 0)"),
    "table's dimensions": (call(cos=COS[0], sin=SIN[0]), ValueError, "(seqlen, rotary_dim / 2) or (batch, seqlen"),
    "sin unlike cos": (
        call(sin=SIN[:8]),
        ValueError,
        "sin must be like cos, float32 (9, 8) on cpu, got float32 (8, 8)",
    ),
    "table in bf16": (
        call(cos=COS.bfloat16(), sin=SIN.bfloat16()),
        TypeError,
        "cos and sin must be float32, got bfloat16 (9, 8) on cpu: make them with onepass.rope_table",
    ),
    "table's device": (call(cos=COS.to("meta"), sin=SIN.to("meta")), ValueError, "must be on q's device cpu"),
    "table with gradient": (call(cos=COS.clone().requires_grad_()), ValueError, "cos has requires_grad=True"),
    "cos as list": (call(cos=[1.0]), TypeError, "cos must be a torch.Tensor, got list"),
    "float ids": (call(position_ids=IDS.float()), TypeError, "position_ids must be int32 or int64, got float32 (2, 9)"),
    "ids' shape": (call(position_ids=IDS[0]), ValueError, "position_ids must be (batch, seqlen) = (2, 9) on cpu"),
    "ids with a table per batch": (
        call(cos=COS.repeat(2, 1, 1), sin=SIN.repeat(2, 1, 1), position_ids=IDS),
        ValueError,
        "must be a table (positions, rotary_dim / 2) with position_ids, got (2, 9, 8)",
    ),
    "ids with an empty table": (call(cos=COS[:0], sin=SIN[:0], position_ids=IDS), ValueError, "got (0, 8)"),
    "interleaved": (call(interleaved=1), TypeError, "interleaved must be True or False, got 1"),
    "unknown": (call(unsqueeze_dim=1), TypeError, "unexpected keyword argument 'unsqueeze_dim': q and k are (batch"),
    "backend": (call(backend="cuda"), ValueError, "backend='cuda' is unknown to rope"),
    "double": (call(q=Q.double(), k=K.double()), onepass.UnsupportedError, "q's dtype float64"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        bad()


def with_argument(place: int, change: Callable[[Any], Any]) -> Any:
    return lambda launcher: lambda *args: launcher(*(change(x) if i == place else x for i, x in enumerate(args)))


def with_results(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    return lambda launcher: lambda *args: change(*launcher(*args))


FAULTS = {
    "cos passed as sin": lambda launcher: lambda q, k, cos, sin, *rest: launcher(q, k, sin, cos, *rest),
    "backward not inverted": with_argument(6, lambda inverse: False),
    "forward inverted": with_argument(6, lambda inverse: not inverse),
    "pairs for halves": with_argument(5, lambda interleaved: not interleaved),
    "one position late": with_argument(2, lambda cos: cos.roll(1, 0)),
    "k not turned": lambda launcher: lambda q, k, *rest: (launcher(q, k, *rest)[0], k.clone()),
    "heads mixed up": with_results(lambda q, k: (q.flip(2), k)),
    "rest not copied": with_results(lambda q, k: (torch.cat((q[..., :12], q[..., 12:] * 0), -1), k)),
    "a thousandth off": with_results(lambda q, k: (q, k * 1.001)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_noticed(fault: Any, fused: str, device: str, generator: torch.Generator) -> None:
    case = RopeCase("partial", head_dim=20, rotary_dim=12)
    inputs = case.inputs(torch.float32, device, generator)
    conformance.fault_is_noticed(case, inputs, fused, kernels.FORWARD, fault)


def test_explain(backend: str, device: str) -> None:
    q, k, *table = (x.to(device) for x in (Q, K, COS, SIN))
    assert list(onepass.explain("rope", q, k, *table, backend=backend).backends) == [backend]
    assert len(onepass.explain("rope", q.clone().requires_grad_(), k, *table, backend=backend)) == 2
