"""rope_table, Llama 3.1's scaling, and onepass.nn.RotaryEmbedding."""

import math
import re
from typing import Any

import pytest
import torch

import onepass
from onepass import nn


def test_is_the_formula() -> None:
    cos, sin = onepass.rope_table(6, 5, base=100.0)
    assert cos.shape == sin.shape == (5, 3)
    assert cos.dtype is sin.dtype is torch.float32
    for position in range(5):
        for i in range(3):
            angle = position * 100.0 ** (-2 * i / 6)
            assert float(cos[position, i]) == pytest.approx(math.cos(angle), abs=1e-7)
            assert float(sin[position, i]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_positions_may_be_floats_per_batch() -> None:
    ids = torch.tensor([[0.0, 1.5, -2.0], [3.0, 0.25, 1e5]])
    cos, sin = onepass.rope_table(4, position_ids=ids)
    assert cos.shape == (2, 3, 2)
    torch.testing.assert_close(cos[..., 0], ids.double().cos().float())
    torch.testing.assert_close(sin[..., 1], (ids.double() * 0.01).sin().float())
    whole = onepass.rope_table(4, position_ids=torch.arange(7))
    for a, b in zip(whole, onepass.rope_table(4, 7), strict=True):
        assert torch.equal(a, b)


def test_far_positions_keep_their_phase() -> None:
    """fp32 angles are off by 0.004 at position 131071."""
    cos, _ = onepass.rope_table(128, position_ids=torch.tensor([131071]), base=500000.0)
    exact = [math.cos(131071 * 500000.0 ** (-2 * i / 128)) for i in range(64)]
    torch.testing.assert_close(cos[0], torch.tensor(exact), rtol=0, atol=1e-6)


def test_llama_scaling() -> None:
    """Wavelengths below 2048 are kept, above 8192 divided by 8, between them blended."""
    plain = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    _, plain_sin = onepass.rope_table(128, position_ids=torch.tensor([1e-3], dtype=torch.float64), base=500000.0)
    _, sin = onepass.rope_table(
        128, position_ids=torch.tensor([1e-3], dtype=torch.float64), base=500000.0, scaling=onepass.RopeScaling()
    )
    ratio = (sin / plain_sin)[0].double()  # of the frequencies: sin of a tiny angle is the angle
    wavelength = 2 * math.pi / plain
    smooth = (8192 / wavelength - 1) / 3
    wanted = torch.where(wavelength < 2048, 1.0, torch.where(wavelength > 8192, 1 / 8, (1 - smooth) / 8 + smooth))
    torch.testing.assert_close(ratio, wanted, rtol=1e-5, atol=0)
    assert (wanted == 1).sum() > 10
    assert (wanted == 1 / 8).sum() > 10
    assert ((wanted != 1) & (wanted != 1 / 8)).any()


def test_scaling_may_be_a_mapping() -> None:
    config = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    for a, b in zip(
        onepass.rope_table(8, 9, scaling=config), onepass.rope_table(8, 9, scaling=onepass.RopeScaling()), strict=True
    ):
        assert torch.equal(a, b)


IDS = torch.arange(3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "odd": ({"rotary_dim": 33, "max_seqlen": 4}, ValueError, "rotary_dim must be even and at least 2 (features are tu"),
    "zero": ({"rotary_dim": 0, "max_seqlen": 4}, ValueError, "rotary_dim must be even and at least 2"),
    "float": ({"rotary_dim": 32.0, "max_seqlen": 4}, TypeError, "rotary_dim must be an int, got 32.0"),
    "neither": ({"rotary_dim": 4}, ValueError, "either max_seqlen or position_ids: got neither"),
    "both": ({"rotary_dim": 4, "max_seqlen": 3, "position_ids": IDS}, ValueError, "or position_ids: got both"),
    "negative": ({"rotary_dim": 4, "max_seqlen": -3}, ValueError, "max_seqlen must be at least 0, got -3"),
    "tensor": ({"rotary_dim": 4, "max_seqlen": IDS}, TypeError, "max_seqlen must be an int"),
    "list": ({"rotary_dim": 4, "position_ids": [1]}, TypeError, "position_ids must be a torch.Tensor, got list"),
    "bool": ({"rotary_dim": 4, "position_ids": IDS > 1}, TypeError, "must be integers or floats, got bool (3,)"),
    "shape": ({"rotary_dim": 4, "position_ids": IDS[0]}, ValueError, "must be (seqlen,) or (batch, seqlen), got ()"),
    "base": ({"rotary_dim": 4, "max_seqlen": 3, "base": 0}, ValueError, "base must be above 0, got 0.0"),
    "scaling": ({"rotary_dim": 4, "max_seqlen": 3, "scaling": 8.0}, TypeError, "scaling must be a RopeScaling, a map"),
    "kind": (
        {"rotary_dim": 4, "max_seqlen": 3, "scaling": {"rope_type": "yarn"}},
        ValueError,
        "scaling's rope_type must be 'llama3', got 'yarn'",
    ),
    "entry": (
        {"rotary_dim": 4, "max_seqlen": 3, "scaling": {"factors": 8.0}},
        ValueError,
        "scaling has the unknown entries factors: it takes factor,",
    ),
    "factor": (
        {"rotary_dim": 4, "max_seqlen": 3, "scaling": {"factor": 0}},
        ValueError,
        "scaling's factor must be above 0, got 0",
    ),
    "band": (
        {"rotary_dim": 4, "max_seqlen": 3, "scaling": {"high_freq_factor": 1}},
        ValueError,
        "scaling's high_freq_factor must be above its low_freq_factor 1.0, got 1",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        onepass.rope_table(**options)


def test_module_is_the_function(backend: str, device: str, generator: torch.Generator) -> None:
    q, k = (torch.randn(2, 5, heads, 16, generator=generator).to(device) for heads in (4, 2))
    options: dict[str, Any] = {"base": 500.0, "scaling": onepass.RopeScaling(original_max_position_embeddings=64)}
    cos, sin = onepass.rope_table(12, 20, **options, device=device)
    ids = torch.randint(0, 20, (2, 5), generator=generator).to(device)
    floats = torch.rand(2, 5, generator=generator).to(device) * 20
    for max_seqlen in (20, None):
        module = nn.RotaryEmbedding(12, max_seqlen, interleaved=True, backend=backend, **options).to(device)
        given: list[tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]] = [
            ({}, (cos[:5], sin[:5])),
            ({"start": 15}, (cos[15:], sin[15:])),
            ({"position_ids": ids}, (cos[ids], sin[ids])),
            ({"position_ids": floats}, onepass.rope_table(12, position_ids=floats, **options, device=device)),
        ]
        for arguments, table in given:
            expected = onepass.rope(q, k, *table, interleaved=True, backend=backend)
            for a, b in zip(module(q, k, **arguments), expected, strict=True):
                assert torch.equal(a, b)
        assert not module.state_dict()
        assert not list(module.parameters())
        assert "12, max_seqlen=" in repr(module)


def test_module_keeps_its_table(backend: str, device: str) -> None:
    module = nn.RotaryEmbedding(8, 6, backend=backend)
    cos = module.cos.clone()
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")):
        converted = convert(torch.nn.Sequential(module))[0]
        assert converted.cos.dtype is torch.float32
        assert torch.equal(converted.cos, cos)
    with torch.device("meta"):
        late = nn.RotaryEmbedding(8, 6)
    assert late.cos.is_meta
    late = late.to_empty(device="cpu")
    assert torch.equal(late.cos, cos)


def test_module_refuses(generator: torch.Generator) -> None:
    q = torch.randn(2, 5, 4, 16, generator=generator)
    module = nn.RotaryEmbedding(8, 6, backend="reference")
    with pytest.raises(ValueError, match="positions 2 to 6 are past the table's max_seqlen 6"):
        module(q, q, start=2)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        module(q, q, start=-1)
    with pytest.raises(ValueError, match="start counts only without position_ids"):
        module(q, q, start=1, position_ids=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        nn.RotaryEmbedding(9, 6)
