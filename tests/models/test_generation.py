"""Drawing tokens: options, seeds, sliding, and that cached and uncached runs write the same."""

import math

import pytest
import torch

from onepass.generation import SampleConfig, choose_token, generate
from onepass.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=13, context=16, layers=2, heads=2, width=16, attention="sdpa")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def write(model, prompt=(1,), **options):
    return list(generate(model, torch.tensor(prompt), SampleConfig(**options)))


@pytest.mark.parametrize("prompt", [(1,), tuple(range(13)), tuple(i % 13 for i in range(40))])
def test_cached_and_uncached_agree_past_a_full_context(model, prompt):
    options = {"prompt": prompt, "tokens": 60, "temperature": 1.0}
    assert write(model, **options) == write(model, **options, no_cache=True)


def test_seeds(model):
    assert write(model, seed=1, tokens=30) == write(model, seed=1, tokens=30)
    assert write(model, seed=1, tokens=30) != write(model, seed=2, tokens=30)
    assert write(model, tokens=0) == []


def test_global_random_state_is_left_alone(model):
    before = torch.get_rng_state()
    write(model, tokens=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams(model):
    stream = generate(model, torch.tensor([1]), SampleConfig(tokens=10**6))
    assert [next(stream) for _ in range(3)] == write(model, tokens=3)


def draws(logits, count=300, **options):
    config, generator = SampleConfig(**options), torch.Generator().manual_seed(3)
    return {choose_token(torch.tensor(logits), config, generator) for _ in range(count)}


def test_choices():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert draws(probabilities, temperature=0.0) == {0}
    assert draws(probabilities, temperature=1.0) == {0, 1, 2, 3}
    assert draws(probabilities, temperature=1.0, top_k=2) == {0, 1}
    assert draws(probabilities, temperature=1.0, top_p=0.7) == {0, 1}
    assert draws(probabilities, temperature=1.0, top_p=1e-6) == {0}
    assert draws(probabilities, temperature=1.0, top_p=1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected a number of 64 bits"),
        ({"tokens": -1}, "tokens is -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**options)


def test_wrong_prompts_and_logits(model):
    with pytest.raises(ValueError, match="expected \\(length,\\) with at least one token"):
        generate(model, torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits are not finite"):
        choose_token(torch.tensor([0.0, float("nan")]), SampleConfig(), torch.Generator())


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-40, 1e39, 1.7e308])
def test_any_temperature_draws_a_token_that_may_be_drawn(temperature):
    for logits in (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-math.inf, 1.0, -math.inf])):
        token = choose_token(logits, SampleConfig(temperature=temperature), torch.Generator().manual_seed(0))
        assert 0 <= token < 3
        assert logits[token] > -math.inf
        assert temperature > 1 or token == int(logits.argmax())
