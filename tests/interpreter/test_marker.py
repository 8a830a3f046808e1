"""Tests marked `interpreted` lie in folders whose tests run in Triton's interpreter."""

from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
_OPS = Path(__file__).parents[2] / "src" / "onepass" / "ops"


def test_what_needs_the_interpreter_lies_where_it_runs_there(request: pytest.FixtureRequest) -> None:
    marked = {item.path.parent for item in request.session.items if item.get_closest_marker("interpreted") is not None}
    assert marked <= {_TESTS / path.parent.name for path in _OPS.glob("*/triton")}
