"""How well a model predicts a text, position by position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onepass.models.weights import load_model, save_model
from onepass.training.data import TextData, windows_at

__all__ = ["export_model", "position_losses"]

BANDS = ((256, 1024), (1024, 2048))  # positions whose losses tell whether a long context helps


def position_losses(
    model: nn.Module,
    tokens: Tensor,
    starts: Tensor,
    length: int,
    *,
    batch: int = 16,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Mean cross-entropy in nats at each position of the windows of ``tokens`` at ``starts``: fp64 (length,).

    The model is put in ``eval`` mode for it and then back. None when ``should_stop`` said so between two batches.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(length, dtype=torch.float64, device=tokens.device)
    try:
        with torch.inference_mode():
            for part in starts.split(batch):
                if should_stop():
                    return None
                inputs, targets = windows_at(tokens, part, length)
                losses = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction="none")
                total += losses.view(len(part), length).double().sum(0)
    finally:
        model.train(was_training)
    return (total / len(starts)).cpu()


def spread_starts(tokens: Tensor, context: int, limit: int | None = None) -> tuple[Tensor, int]:
    """Windows side by side over the whole of ``tokens``, or ``limit`` of them spread evenly: their starts and length.

    The length is ``context``, or less when ``tokens`` are fewer.
    """
    length = min(context, tokens.numel() - 1)
    starts = torch.arange(0, tokens.numel() - length, length)
    if limit is not None and len(starts) > limit:
        starts = starts[torch.arange(limit) * len(starts) // limit]
    return starts, length


def export_model(
    source: Path, target: Path, data: TextData, device: torch.device, made_by: dict[str, Any]
) -> dict[str, Any]:
    """Copies a stored model to ``target`` with a record of how well the stored bf16 weights predict the last tenth.

    The computation is in fp32. ``validation_loss`` is the mean over windows side by side and all their positions. A
    model with a long context also gets its mean at positions 256-1023 and 1024-2047, over windows that overlap (a
    stride of an eighth of the context), so that both bands cover the same text. Returns the record.
    """
    stored = load_model(source, device=device)
    model = stored.model
    model.set_attention("sdpa")
    validation = data.validation.to(device)
    context = model.config.context
    starts, length = spread_starts(validation, context)
    record = {
        "validation_loss": _mean(position_losses(model, validation, starts, length)),
        "validation_text": "the last tenth of the text, in windows side by side",
        "validation_characters": validation.numel(),
        "text_sha256": data.sha256,
    }
    if context >= BANDS[-1][1] and length == context:
        stride = context // 8
        overlapping = position_losses(model, validation, torch.arange(0, validation.numel() - context, stride), context)
        record["overlapping_stride"] = stride
        record["overlapping_loss"] = _mean(overlapping)
        for first, end in BANDS:
            record[f"loss_at_{first}_{end - 1}"] = _mean(overlapping[first:end]) if overlapping is not None else None
    record |= made_by
    model.set_attention("auto")
    save_model(target, model, stored.tokenizer, {**stored.record, **record})
    return record


def _mean(losses: Tensor | None) -> float | None:
    return None if losses is None else float(losses.mean())
