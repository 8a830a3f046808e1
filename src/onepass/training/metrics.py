"""A run's metrics: one JSON object per line, and the picture of its losses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from onepass.core.files import replace_file

__all__ = ["MetricsLog", "draw_losses", "read_metrics"]

ADVICE = "correct or remove that line, or remove the file"


class MetricsLog:
    """Appends to a JSON-lines file; a resumed run first drops the lines that its checkpoint does not know of."""

    def __init__(self, path: Path, *, keep_steps: int | None = None) -> None:
        """``keep_steps``: keep lines of at most this step; None: start anew."""
        self.path = path
        records = [] if keep_steps is None or not path.exists() else read_metrics(path)
        kept = [record for record in records if keep_steps is not None and record["step"] <= keep_steps]
        replace_file(path, _lines(kept).encode())

    def write(self, records: list[dict[str, Any]]) -> None:
        if not records:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(records))
        except OSError as error:
            reason = f"could not write {self.path}: {error.strerror}; the last checkpoint is whole"
            raise OSError(error.errno, reason) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut off while it was written is left out.

    Raises ``ValueError`` naming the file and the line when a line is not a JSON object with a ``step``.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line, parse_constant=_refuse)
        except ValueError as error:  # also of bytes that are not UTF-8
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {ADVICE}") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number} is not an object with a whole number 'step': {ADVICE}")
        records.append(record)
    return records


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draws the training and validation losses of a metrics file as a PNG. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the loss curve needs matplotlib: pip install 'onepass[cli]'") from error

    records = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("validation_loss", "validation", {"linewidth": 1.6, "marker": "o", "markersize": 3}),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label} (last {points[-1][1]:.3f})", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(picture, buffer.getvalue())
