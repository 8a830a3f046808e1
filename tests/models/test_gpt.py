"""The GPT itself: its size, its cache, and the ways its attention runs."""

import pytest
import torch

from onepass.models.attention import AttentionChoice
from onepass.models.gpt import GPT, GPTConfig, preset

SMALL = GPTConfig(vocab_size=11, context=32, layers=2, heads=2, width=16, attention="sdpa")


def test_shakes_has_the_size_of_nanogpts_cpu_example():
    model = GPT(preset("shakes"))
    assert f"{model.parameter_count() / 1e6:.2f}M" == "0.80M"
    assert f"{model.parameter_count(positions=True) / 1e6:.2f}M" == "1.06M"


@pytest.mark.parametrize("bias", [False, True])
def test_bias_option(bias):
    config = GPTConfig(vocab_size=5, context=8, layers=1, heads=1, width=4, bias=bias)
    assert any(name.endswith("bias") for name, _ in GPT(config).named_parameters()) is bias


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 5, 7], [19, 1]])
def test_cache_gives_the_logits_of_the_whole_text(chunks):
    model = GPT(SMALL).eval()
    tokens = torch.randint(11, (3, 20))
    cache = model.new_cache(3)
    with torch.no_grad():
        whole = model(tokens)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(tokens, last_only=True), whole[:, -1:], atol=1e-6, rtol=1e-5)


def test_cache_and_context_say_when_they_are_full():
    model = GPT(SMALL).eval()
    with pytest.raises(ValueError, match="33 tokens do not fit in the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    cache = model.new_cache(1, capacity=4)
    with pytest.raises(ValueError, match="holds 0 of 4 tokens: no room for 5 more"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


def test_a_refused_call_leaves_the_cache_as_it_was():
    model = GPT(SMALL).eval()
    cache = model.new_cache(1, capacity=40)
    tokens = torch.zeros(1, 30, dtype=torch.int64)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="60 tokens do not fit in the model's context of 32"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="tokens have batch size 2, the cache 1"):
        model(tokens[:, :1].expand(2, 1), cache=cache)
    with pytest.raises(ValueError, match=r"tokens must be \(batch, tokens\), got \(1,\)"):
        model(tokens[0, :1], cache=cache)
    assert cache.length == 30
    assert cache.cache_seqlens.tolist() == [30]


@pytest.mark.parametrize(("sizes", "message"), [((1, 0), "capacity must be at least 1, got 0"), ((0,), "batch .* 0")])
def test_empty_caches_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPT(SMALL).new_cache(*sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 16 is not divisible by heads 3"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention": "fast"}, "attention is 'fast'; expected one of auto"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"width": 16, "heads": 2, **change})


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset is called 'gpt-giga'; there are gpt-nano"):
        preset("gpt-giga")


def test_tiles_are_for_the_lab_steps():
    with pytest.raises(ValueError, match="block_q and block_k set the tiles of the lab steps"):
        AttentionChoice("sdpa", block_q=128).check()
    AttentionChoice("flash", 128, 512).check()


def test_lab_steps_refuse_to_train():
    model = GPT(SMALL)
    model.attention = "flash"
    with pytest.raises(ValueError, match="'flash' has no backward"):
        model(torch.zeros(1, 4, dtype=torch.int64))
