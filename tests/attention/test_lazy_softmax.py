"""The forward whose weights go by the score of one key: rows that leave its range are computed again."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.core import replay
from onepass.ops.attention.inputs import AttentionCase
from onepass.ops.attention.inputs_varlen import VarlenCase
from onepass.testing import numerics

pytest.importorskip("triton", reason="Triton is not installed")

from onepass.ops.attention.triton import fwd
from onepass.ops.attention.triton.problem import Problem

devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
SEQLEN = 200
LEAST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 and on few keys, too."""
    monkeypatch.setattr(Problem, "lazy", property(lambda problem: problem.key_mask is None))


def _exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, visible: Tensor) -> tuple[Tensor, ...]:
    """out, lse and the largest |score| that counts, of each row."""
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    if bias is not None:  # beside large numbers fp32 has no digits for the products
        scores = torch.where(bias.abs() >= 1e9, bias.double(), scores + bias.double())
    scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp(min=-1e300)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    weights = (weights / total).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v.double()), lse, largest.squeeze(-1).abs()


def _visible(left: int, right: int, device: str) -> Tensor:
    ahead = torch.arange(SEQLEN, device=device) - torch.arange(SEQLEN, device=device)[:, None]
    return (ahead <= (right if right >= 0 else SEQLEN)) & (ahead >= -(left if left >= 0 else SEQLEN))


def _assert_exact(
    device: str, generator: torch.Generator, change: Callable[[Tensor], Any] | None = None, scale: float = 32**-0.5,
    left: int = -1, right: int = -1, values: float = 1.0,
) -> None:  # fmt: skip
    """`change` fills a bias, of noise before."""
    q, k, v = (torch.randn(1, SEQLEN, 1, 32, generator=generator).to(device) for _ in range(3))
    v *= values
    bias = None
    if change is not None:
        bias = torch.randn(1, 1, SEQLEN, SEQLEN, generator=generator).to(device)
        change(bias)
    out, lse = fwd.forward(q, k, v, bias, None, None, None, None, scale, left, right, True, 0.0, 0.0, False)
    expected, expected_lse, largest = _exact(q, k, v, bias, scale, _visible(left, right, device))
    # A score is a sum of 32 products, rounded; a row's weights are wrong by that, relative to 1.
    spread = torch.einsum("bihd,bjhd->bhij", q.abs(), k.abs()).amax(-1) * abs(scale)
    relative = (1e-6 * (1.0 + spread + largest.clamp(max=1e4))).double()
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    seen = ~lse.isneginf()
    assert ((lse - expected_lse).abs() <= relative + 1e-6 * expected_lse.abs())[seen].all()
    assert ((out - expected).abs() <= values * 4.0 * relative.transpose(1, 2)[..., None]).all()


@devices
@pytest.mark.parametrize("scale", [32**-0.5, 3.0, -0.2, 0.0])
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (60, -1), (100, 0), (70, 30)])
def test_scores_of_any_size(device: str, left: int, right: int, scale: float, generator: torch.Generator) -> None:
    _assert_exact(device, generator, scale=scale, left=left, right=right)


def _rising(slope: float) -> Callable[[Tensor], Any]:
    return lambda bias: bias.add_(slope * torch.arange(SEQLEN, device=bias.device))


BIASES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda bias: None,
    "far below": lambda bias: bias.sub_(3000.0),
    "far above": lambda bias: bias.add_(3000.0),
    "rising": _rising(0.5),
    "rising fast": _rising(20.0),
    "falling fast": _rising(-20.0),
    "one key far above": lambda bias: bias[..., 141].add_(500.0),
    "one row's key far above": lambda bias: bias[..., 70, 141].add_(5000.0),
    "first keys hidden": lambda bias: bias[..., :90].fill_(-torch.inf),
    "first keys hidden by the least number": lambda bias: bias[..., :90].fill_(LEAST),
    "last keys hidden": lambda bias: bias[..., 115:].fill_(-torch.inf),
    "rows that see nothing": lambda bias: bias[..., 60:70, :].fill_(-torch.inf),
    "rows of the least number": lambda bias: bias[..., 60:70, :].fill_(LEAST),
    "rows of one low number": lambda bias: bias[..., 60:70, :].fill_(-1e30),
    "rows of one large number": lambda bias: bias[..., 60:70, :].fill_(1e10),
    "rows of the largest number": lambda bias: bias[..., 60:70, :].fill_(-LEAST),
    "causal": lambda bias: bias.masked_fill_(~_visible(-1, 0, str(bias.device)), -torch.inf),
}


@devices
@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("name", BIASES)
def test_biases_of_any_size(device: str, name: str, right: int, generator: torch.Generator) -> None:
    _assert_exact(device, generator, BIASES[name], right=right)


@devices
@pytest.mark.parametrize("name", ["none", "one key far above"])
def test_values_that_nearly_overflow(device: str, name: str, generator: torch.Generator) -> None:
    """Sums of them with weights above 1 would."""
    _assert_exact(device, generator, BIASES[name], values=1e37)


@devices
def test_what_is_not_a_number_stays_in_its_rows(device: str, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, SEQLEN, 2, 32, generator=generator).to(device) for _ in range(3))
    options = (None, None, None, None, None, 32**-0.5, -1, 0, True, 0.0, 0.0, False)
    expected, _ = fwd.forward(q, k, v, *options)
    q[:, 90, 1] = torch.nan
    out, lse = fwd.forward(q, k, v, *options)
    assert out[:, 90, 1].isnan().all()
    assert lse[:, 1, 90].isnan().all()
    out[:, 90, 1] = expected[:, 90, 1]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # rows beside it: again, and by their maxima


@devices
def test_each_way_is_taken(device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in doubt is rounded as careful steps round it, others are not."""
    q, k, v = (torch.randn(1, 2 * SEQLEN, 1, 32, generator=generator).to(device) for _ in range(3))
    options = (None, None, None, None, None, 32**-0.5, -1, -1, True, 0.0, 0.0, False)

    def rows_alike(careful: Tensor) -> Tensor:
        return (fwd.forward(q, k, v, *options)[0] == careful).all(-1).flatten()

    def careful() -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(Problem, "lazy", property(lambda problem: False))
            return fwd.forward(q, k, v, *options)[0]

    assert not rows_alike(careful()).all()
    q[:, 5] *= 1000.0
    alike = rows_alike(careful())
    assert alike[:16].all()
    assert not alike[256:].all()


LONG = (SEQLEN, 7, 150)
CASES = [
    AttentionCase("grouped heads", batch=1, seqlen_q=70, seqlen_k=SEQLEN, nheads_q=6, nheads_kv=2, causal=True),
    AttentionCase("sink", batch=1, seqlen_q=SEQLEN, seqlen_k=SEQLEN, sink=True, causal=True, window_size=(150, -1)),
    AttentionCase("head_dim 40, head_dim_v 72", batch=1, seqlen_q=70, seqlen_k=SEQLEN, head_dim=40, head_dim_v=72),
    VarlenCase("packed, grouped heads", seqlens_q=LONG, seqlens_k=LONG, causal=True, nheads_q=2, nheads_kv=1),
    VarlenCase("packed, other keys", seqlens_q=(150, 7, 0), seqlens_k=(SEQLEN, 150, 9), used=(SEQLEN - 3, 140, 0)),
    VarlenCase("packed, window, sink", seqlens_q=LONG, seqlens_k=LONG, window_size=(120, 30), sink=True),
    VarlenCase("packed, bias", seqlens_q=LONG, seqlens_k=LONG, bias=(1, 0, 1, 0), causal=True),
]


@replay.paused()  # a plan that was recorded keeps its constants
def _forward(case: AttentionCase | VarlenCase, inputs: Mapping[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
    options = case.options(inputs)
    if isinstance(case, VarlenCase):
        return onepass.attention_varlen(*case.tensors(inputs), **options, return_lse=True, backend=backend)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    return onepass.attention(q, k, v, **options, return_lse=True, backend=backend)


@devices
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(
    device: str, case: AttentionCase | VarlenCase, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed sequences, grouped heads and sinks; some rows are computed again."""
    inputs = case.inputs(torch.float32, device, torch.Generator().manual_seed(seed))
    inputs["q"].transpose(-3, -2)[..., : inputs["q"].shape[-3] // 3, :] *= 30.0  # rows of the first blocks
    lazy = _forward(case, inputs, "triton")
    exact, rounded = _forward(case, numerics.in_double(inputs), "reference"), _forward(case, inputs, "reference")
    terms = case.terms(inputs)
    for name, *three in zip(("out", "lse"), lazy, exact, rounded, strict=True):
        numerics.assert_within_budget([numerics.compare(name, *three, terms[name])], case=case, device=device)
    monkeypatch.setattr(Problem, "lazy", property(lambda problem: False))
    assert not torch.equal(lazy[0], _forward(case, inputs, "triton")[0])
