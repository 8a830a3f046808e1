"""Checkpoints of a training run: everything that its next step depends on, written whole or not at all."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onepass.core.files import replace_file

__all__ = ["ADVICE", "CheckpointError", "load_checkpoint", "require_shapes", "save_checkpoint"]

FORMAT = 1
ENTRIES: dict[str, type | tuple[type, ...]] = {  # what a run needs to go on, and of which type
    "config": dict,
    "text_sha256": str,
    "model": dict,
    "optimizer": dict,
    "data_order": torch.Tensor,
    "cpu_random": torch.Tensor,
    "device_random": (torch.Tensor, type(None)),
    "step": int,
    "evaluated_at": int,
    "best_loss": float,
    "best_step": int,
}
ADVICE = "put the run's own checkpoint back, or start anew in another --out without --resume"
ZIP = b"PK\x03\x04"  # what torch.save writes begins with this


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from. The message names the file and what is wrong."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, and lists and dicts of them).

    Raises ``OSError`` when the disk refuses it; the previous checkpoint is then as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    replace_file(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote of a run, on the CPU.

    Raises :class:`CheckpointError` when the file is absent, damaged, something else, or lacks what a run needs.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path} to resume from; start without --resume")
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            raise CheckpointError(f"{path} is not a training checkpoint, but a file of another kind: {ADVICE}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # Without PyTorch's own reason: it advises to load what nobody trusts.
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: damaged or cut short, or a file of another kind; {ADVICE}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} is not a training checkpoint of this version: format {found}, expected {FORMAT}; {ADVICE}"
        )
    for name, kind in ENTRIES.items():
        if name not in state:
            raise CheckpointError(f"{path} lacks {name!r}, which a run needs to go on: {ADVICE}")
        if not isinstance(state[name], kind):
            raise CheckpointError(f"{path} has a {type(state[name]).__name__} as {name!r}: {ADVICE}")
    return state


def require_shapes(path: Path, part: str, found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises :class:`CheckpointError` unless ``found`` has the names and shapes of ``expected``."""
    for name in sorted(found.keys() | expected.keys()):
        mine, theirs = (
            f"shape {tuple(tensor.shape)}" if isinstance(tensor := tensors.get(name), torch.Tensor) else "no tensor"
            for tensors in (expected, found)
        )
        if mine != theirs:
            raise CheckpointError(f"{path}: {name} of its {part} has {theirs}, expected {mine}; {ADVICE}")
