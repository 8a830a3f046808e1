"""The Triton kernels without a GPU: each operation's tests once more, in a process with Triton's interpreter."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from onepass.core import env

_OPS = sorted(path.parent.name for path in Path(__file__).parents[2].glob("src/onepass/ops/*/triton"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(env.triton_interpreted(), reason="this is Triton's interpreter already")
@pytest.mark.parametrize("op", _OPS)
def test_in_the_interpreter(op: str, runs: Any) -> None:
    total = 0
    for status, output in runs.results(op):
        assert status == 0, output[-10000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None, output
        total += int(passed[1])
    assert total > 20
