"""What a stored model's record says about it."""

import pytest
import torch

from onepass.models.gpt import GPT, GPTConfig
from onepass.models.tokenizer import CharTokenizer
from onepass.models.weights import load_model, save_model
from onepass.training import evaluation
from onepass.training.data import TextData
from onepass.training.evaluation import export_model, position_losses, spread_starts


def test_position_losses_are_the_models(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=7, context=8, layers=1, heads=1, width=4, attention="sdpa", dropout=0.5))
    tokens = torch.randint(7, (30,))
    starts = torch.tensor([0, 5, 20])
    losses = position_losses(model, tokens, starts, 8, batch=2)
    assert model.training
    model.eval()
    expected = torch.zeros(8)
    for start in starts.tolist():
        with torch.no_grad():
            log_p = model(tokens[None, start : start + 8])[0].log_softmax(-1)
        expected -= log_p[torch.arange(8), tokens[start + 1 : start + 9]] / 3
    torch.testing.assert_close(losses.float(), expected)
    assert position_losses(model, tokens, starts, 8, should_stop=lambda: True) is None


def test_windows_side_by_side():
    tokens = torch.zeros(101)
    assert spread_starts(tokens, 20)[0].tolist() == [0, 20, 40, 60, 80]
    assert spread_starts(tokens, 20, limit=2)[0].tolist() == [0, 40]
    starts, length = spread_starts(torch.zeros(5), 20)
    assert (starts.tolist(), length) == ([0], 4)


def test_export_records_the_stored_file(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BANDS", ((2, 8), (8, 16)))
    text = "to be or not to be " * 40
    model = GPT(GPTConfig(vocab_size=len(set(text)), context=16, layers=1, heads=1, width=8))
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_model(source, model, CharTokenizer.of_text(text), {"step": 3})
    data = TextData.of_text(text, 16)
    record = export_model(source, target, data, torch.device("cpu"), {"training": {"lr": 0.1}})
    stored = load_model(target)
    assert stored.record == {"step": 3, **record}
    assert record["training"] == {"lr": 0.1}
    for mine, original in zip(stored.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, original.bfloat16().float())
    stored.model.set_attention("sdpa")
    losses = position_losses(stored.model, data.validation, *spread_starts(data.validation, 16))
    assert record["validation_loss"] == pytest.approx(float(losses.mean()), abs=1e-6)
    bands = record["loss_at_2_7"] * 6 + record["loss_at_8_15"] * 8
    assert 0 < bands < record["overlapping_loss"] * 16
