"""The Triton kernels without a GPU: in a process with Triton's interpreter, each operation's tests of the backend
`triton` once more, and what is marked `interpreted`.
"""

import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from onepass.core import env
from onepass.testing.background import Background

_ROOT = Path(__file__).parents[2]
_OPS = sorted(path.parent.name for path in _ROOT.glob("src/onepass/ops/*/triton"))
_ARGUMENTS = ("-k", "triton or interpreted", "-p", "no:cacheprovider")
_POSSIBLE = importlib.util.find_spec("triton") is not None and not env.triton_interpreted()


def _parts(op: str) -> list[list[str]]:
    """What runs apart: the longest file, the oracle's, and the others."""
    oracle = f"{_ROOT}/tests/{op}/test_{op}_oracle.py"
    return [[oracle], [f"{_ROOT}/tests/{op}", f"--ignore={oracle}"]]


def begin_in_background(background: Background, items: list[pytest.Function]) -> None:
    environment = {**background.environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for item in items if _POSSIBLE else ():
        op, seed = item.callspec.params["op"], str(item.config.option.seed)
        for index, part in enumerate(_parts(op)):
            command = [sys.executable, "-m", "pytest", *part, "-q", *_ARGUMENTS, "--seed", seed]
            background.begin(f"{op} {index}", functools.partial(background.run, command, environment))


@pytest.mark.slow
@pytest.mark.skipif(not _POSSIBLE, reason="Triton is not installed, or interpreted already")
@pytest.mark.parametrize("op", _OPS)
def test_in_the_interpreter(op: str, background: Background) -> None:
    total = 0
    for index in range(len(_parts(op))):
        result = background.result(f"{op} {index}")
        assert result.returncode == 0, result.stdout[-10000:]
        passed = re.search(r"(\d+) passed", result.stdout)
        assert passed is not None, result.stdout
        total += int(passed[1])
    assert total > 20
