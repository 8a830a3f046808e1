"""Reading and writing a model as one safetensors file.

The tensors are the model's ``state_dict``; the metadata (strings, as the format has it) holds

- ``architecture``: which model class, ``gpt``;
- ``config``: its configuration, JSON;
- ``characters``: the vocabulary, JSON string;
- ``record``: whatever is known of how it was made and how well it does, JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onepass.core.files import replace_file
from onepass.models.gpt import GPT, GPTConfig
from onepass.models.tokenizer import CharTokenizer

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save as serialise
except ImportError as error:
    raise ImportError("reading and writing models needs safetensors: pip install 'onepass[cli]'") from error

__all__ = ["StoredModel", "WeightsError", "load_model", "save_model"]


class WeightsError(ValueError):
    """A file that does not hold the model that was asked for. The message names the file and what is wrong."""


@dataclass
class StoredModel:
    """What one file holds."""

    model: GPT
    tokenizer: CharTokenizer
    record: dict[str, Any] = field(default_factory=dict)


def save_model(
    path: str | os.PathLike[str],
    model: GPT,
    tokenizer: CharTokenizer,
    record: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes ``model`` whole, or leaves the file that was there. Raises ``OSError`` when it cannot be written."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "architecture": model.architecture,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "characters": json.dumps(tokenizer.characters),
        "record": json.dumps(record or {}),
    }
    replace_file(path, serialise(tensors, metadata))


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StoredModel:
    """Reads a model, ready to generate (``eval`` mode, ``attention`` set to ``auto``).

    Raises ``FileNotFoundError`` when there is no such file and ``WeightsError`` when it is damaged, holds another
    architecture, or its tensors are not those of its configuration.
    """
    metadata, tensors = _read(Path(path))
    architecture = metadata.get("architecture")
    if architecture != GPT.architecture:
        held = f"a model of architecture {architecture!r}" if architecture else "no architecture in its metadata"
        raise WeightsError(f"{path} holds {held}; expected {GPT.architecture!r}")
    try:
        config = GPTConfig(**{**json.loads(metadata["config"]), "attention": "auto", "dropout": 0.0})
        tokenizer = CharTokenizer(json.loads(metadata["characters"]))
        record = json.loads(metadata.get("record", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has unusable metadata: {type(error).__name__}: {error}") from error
    if len(tokenizer) != config.vocab_size:
        raise WeightsError(f"{path} lists {len(tokenizer)} characters for a vocabulary of {config.vocab_size}")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten; the caller's draws stay the same
        model = GPT(config)
    _check_tensors(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return StoredModel(model.to(device, dtype).eval(), tokenizer, record)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} ({size} bytes) cannot be read as safetensors: {error}; it is damaged, cut short or another format"
        ) from error


def _check_tensors(path: str | os.PathLike[str], expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not part of the model" for name in found if name not in expected]
    faults += [
        f"{name} has the shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightsError(f"{path} does not fit its own configuration: {'; '.join(faults[:3])}{more}")
