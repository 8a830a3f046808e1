"""The model through every way of attention: the same logits and the same text, and text that really comes from it."""

from contextlib import ExitStack

import pytest
import torch

from onepass import lab
from onepass.generation import SampleConfig, generate
from onepass.models import attention
from onepass.models.attention import ATTENTION_NAMES, LAB_STEPS
from onepass.models.gpt import GPT, GPTConfig
from onepass.models.weights import SHAKES, load_model
from onepass.ops.attention import kernels
from onepass.testing.faults import replaced

CONFIG = GPTConfig(vocab_size=29, context=80, layers=2, heads=2, width=48)
TILES = [(name, None, None) for name in ATTENTION_NAMES] + [
    (name, block_q, block_k) for name in LAB_STEPS for block_q, block_k in ((3, 5), (128, 512))
]


@pytest.fixture(scope="module")
def shakes():
    return load_model(SHAKES)


@pytest.fixture
def model(seed):
    torch.manual_seed(seed)
    model = GPT(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0)  # scores far from uniform: attention matters
    return model


def text(stored, name, tokens, prompt="ROMEO:\n", **options):
    stored.model.set_attention(name)
    drawn = generate(stored.model, stored.tokenizer.encode(prompt), SampleConfig(tokens=tokens, **options))
    return stored.tokenizer.decode(drawn)


@pytest.mark.parametrize(("name", "block_q", "block_k"), TILES)
def test_logits_with_and_without_cache_are_the_references(model, name, block_q, block_k):
    tokens = torch.randint(29, (2, 70))
    with torch.inference_mode():
        model.attention = "reference"
        expected = model.double()(tokens)
        rounded = model.float()(tokens)
        model.set_attention(name, block_q=block_q, block_k=block_k)
        cache = model.new_cache(2)
        pieces = [model(piece, cache=cache) for piece in tokens.split([50, 1, 1, 9, 9], dim=1)]
        budget = 4 * (rounded - expected).abs().max() + 1e-5 * expected.abs().max()
        for logits in (model(tokens), torch.cat(pieces, dim=1)):
            assert (logits - expected).abs().max() <= budget


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 7}, {"seed": 8, "top_p": 0.9}])
def test_the_same_text_from_every_backend(shakes, options):
    expected = text(shakes, "reference", 300, **options)
    assert len(set(expected)) > 10
    for name in ("auto", "cpu", "sdpa"):
        assert text(shakes, name, 300, **options) == expected, name


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_the_same_text_without_the_cache(shakes, name):
    assert text(shakes, name, 60, no_cache=True) == text(shakes, "sdpa", 60)


def halved(run):
    """A fault: what attention adds is halved."""

    def launcher(*args, **kwargs):
        result = run(*args, **kwargs)
        return (result[0] / 2, *result[1:]) if isinstance(result, tuple) else result / 2

    return launcher


@pytest.mark.parametrize("no_cache", [False, True])
@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_the_text_comes_out_of_the_attention_that_was_named(shakes, name, no_cache, monkeypatch):
    """With this attention's own kernel replaced the text changes; with every other one replaced it does not."""
    expected = text(shakes, name, 50, no_cache=no_cache)
    step = lab.attention_step

    def plant(victim):
        if victim == "sdpa":
            whole = torch.nn.functional.scaled_dot_product_attention
            monkeypatch.setattr(attention.F, "scaled_dot_product_attention", halved(whole))
        elif victim in LAB_STEPS:
            previous = lab.attention_step
            fault = halved(step)

            def broken(*args, **kwargs):
                return (fault if kwargs["step"] == victim else previous)(*args, **kwargs)

            monkeypatch.setattr(lab, "attention_step", broken)
        else:
            for table in (kernels.FORWARD, kernels.DECODE):
                stack.enter_context(replaced(table, victim, halved))

    mine = "cpu" if name == "auto" else name
    with ExitStack() as stack, monkeypatch.context():
        plant(mine)
        assert text(shakes, name, 50, no_cache=no_cache) != expected
    monkeypatch.undo()
    with ExitStack() as stack:
        for other in ATTENTION_NAMES:
            if other not in ("auto", mine):
                plant(other)
        assert text(shakes, name, 50, no_cache=no_cache) == expected


@pytest.mark.parametrize("name", ["auto", "cpu", "reference", "sdpa"])
def test_gradients_are_the_references(model, name):
    tokens = torch.randint(29, (2, 41))

    def gradients(model, name):
        model.set_attention(name)
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])

    expected = gradients(model.double(), "reference")
    rounded = gradients(model.float(), "reference")
    budget = 4 * (rounded - expected).abs().max() + 1e-5 * expected.abs().max()
    assert (gradients(model, name) - expected).abs().max() <= budget


def test_a_cached_model_calls_its_hooks_and_replaced_layers():
    """Generation calls plain functions instead of plain modules, and only of those."""
    model = GPT(CONFIG).eval()
    calls = []
    model.blocks[0].attention["qkv"].register_forward_hook(lambda module, x, y: calls.append("hook"))

    class Replaced(torch.nn.Linear):
        def forward(self, x):
            calls.append("replaced")
            return super().forward(x)

    model.blocks[1].mlp["up"] = Replaced(48, 4 * 48, bias=False)
    with torch.inference_mode():
        model(torch.zeros(1, 3, dtype=torch.int64), cache=model.new_cache())
    assert calls == ["hook", "replaced"]


def test_training_is_refused_before_it_starts():
    queries = torch.zeros(1, 1, 2, 8)
    for name in ("auto", "cpu", "reference", "sdpa"):
        attention.AttentionChoice(name).check_training(queries, 0.1)
    with pytest.raises(ValueError, match=r"'cpu' cannot train this model: train with attention 'sdpa' or 'reference'"):
        attention.AttentionChoice("cpu").check_training(queries.double(), 0.0)
