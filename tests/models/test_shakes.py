"""The model inside the package: what it weighs, what its record says, and that it predicts Shakespeare."""

import math
import os
from pathlib import Path

import pytest
import torch

from onepass.models.gpt import preset
from onepass.models.weights import SHAKES, load_model
from onepass.training.data import SHAKESPEARE_NAME, TextData, load_text
from onepass.training.evaluation import position_losses, spread_starts

REPOSITORY = Path(__file__).parents[2]

# From the last tenth of the text, which the model was not trained on.
PASSAGE = """
GREMIO:
Good morrow, neighbour Baptista.

BAPTISTA:
Good morrow, neighbour Gremio.
God save you, gentlemen!

PETRUCHIO:
And you, good sir! Pray, have you not a daughter
Call'd Katharina, fair and virtuous?

BAPTISTA:
I have a daughter, sir, called Katharina.
"""


@pytest.fixture(scope="module")
def shakes():
    return load_model(SHAKES)


def mean_loss(stored, tokens):
    with torch.inference_mode():
        logits = stored.model(tokens[None, :-1])[0]
    return float(torch.nn.functional.cross_entropy(logits, tokens[1:]))


def test_size_and_configuration(shakes):
    assert SHAKES.stat().st_size <= 3_000_000
    assert shakes.model.config == preset("shakes")
    assert all(torch.equal(p, p.bfloat16().float()) for p in shakes.model.parameters())


def test_record(shakes):
    record = shakes.record
    assert record["validation_loss"] <= 1.62
    assert record["loss_at_1024_2047"] <= record["loss_at_256_1023"] + 0.01
    assert record["validation_characters"] == 111_540
    assert record["training"]["steps"] == 6000


def test_it_predicts_a_passage_that_it_was_not_trained_on(shakes):
    tokens = shakes.tokenizer.encode(PASSAGE)
    assert mean_loss(shakes, tokens) < 1.6
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    assert mean_loss(shakes, shuffled) > math.log(len(shakes.tokenizer))  # worse than no model: it expects Shakespeare


@pytest.mark.slow
def test_the_recorded_loss_is_the_files():
    """Where tinyshakespeare is: in data/ of this repository or the folder of ONEPASS_TEST_DATA."""
    folder = next((f for f in _data_folders() if (f / SHAKESPEARE_NAME).is_file()), None)
    if folder is None:
        pytest.skip(f"needs {SHAKESPEARE_NAME} in data/ or in the folder that ONEPASS_TEST_DATA names")
    stored = load_model(SHAKES)
    data = TextData.of_text(load_text("shakespeare", folder), stored.model.config.context)
    assert stored.record["text_sha256"] == data.sha256
    starts, length = spread_starts(data.validation, stored.model.config.context)
    losses = position_losses(stored.model, data.validation, starts, length, batch=4)
    assert float(losses.mean()) == pytest.approx(stored.record["validation_loss"], abs=1e-4)


def _data_folders():
    named = os.environ.get("ONEPASS_TEST_DATA")
    return [REPOSITORY / "data", *([Path(named)] if named else [])]
