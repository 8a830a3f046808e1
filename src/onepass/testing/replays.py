"""Which calls of an operation go the ordinary way, for tests of those that csrc/replay.cpp does again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onepass.core.replay import PlainCalls

SEEN = 3  # calls until a plan is there


class Ordinary:
    """Counts the calls that go the ordinary way."""

    def __init__(self, calls: PlainCalls, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for way in ("_plain", "_dispatched"):
            monkeypatch.setattr(calls, way, self._counted(getattr(calls, way)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*call: Any) -> Any:
            self.count += 1
            return function(*call)

        return counted
