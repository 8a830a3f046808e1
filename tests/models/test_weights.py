"""Models on the disk: what goes in comes out, and a bad file is named for what it is."""

import json

import pytest
import torch
from safetensors.torch import save_file

from onepass.models.gpt import GPT, GPTConfig
from onepass.models.tokenizer import CharTokenizer
from onepass.models.weights import WeightsError, load_model, save_model

CONFIG = GPTConfig(vocab_size=4, context=8, layers=1, heads=2, width=8)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "model.safetensors"
    model = GPT(CONFIG)
    save_model(path, model, CharTokenizer("abcd"), {"validation_loss": 1.5})
    return path, model


def test_round_trip_keeps_bf16_values(stored):
    path, model = stored
    loaded = load_model(path)
    assert loaded.record == {"validation_loss": 1.5}
    assert loaded.tokenizer.characters == "abcd"
    assert not loaded.model.training
    assert loaded.model.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.bfloat16().float()), name


def test_loading_draws_no_random_numbers(stored):
    before = torch.get_rng_state()
    load_model(stored[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(stored, kept):
    path = stored[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model.safetensors \(\d+ bytes\) cannot be read as safetensors"):
        load_model(path)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model file"):
        load_model(tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="holds no architecture in its metadata; expected 'gpt'"):
        load_model(path)
    save_file({"x": torch.zeros(2)}, path, {"architecture": "llama"})
    with pytest.raises(WeightsError, match="architecture 'llama'; expected 'gpt'"):
        load_model(path)
    save_file({"x": torch.zeros(2)}, path, {"architecture": "gpt", "config": "{}"})
    with pytest.raises(WeightsError, match="unusable metadata: KeyError: 'characters'"):
        load_model(path)


def test_tensors_that_do_not_fit(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in GPT(CONFIG).state_dict().items()}
    tensors["positions.weight"] = torch.zeros(9, 8)
    del tensors["norm.weight"]
    config = {"vocab_size": 4, "context": 8, "layers": 1, "heads": 2, "width": 8}
    save_file(tensors, path, {"architecture": "gpt", "config": json.dumps(config), "characters": '"abcd"'})
    with pytest.raises(WeightsError, match=r"norm.weight is missing; positions.weight has the shape \(9, 8\)"):
        load_model(path)


def test_failed_write_keeps_the_old_file(stored, monkeypatch):
    path = stored[0]
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onepass.core.files.os.fsync", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device; the file that was there"):
        save_model(path, GPT(CONFIG), CharTokenizer("abcd"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
