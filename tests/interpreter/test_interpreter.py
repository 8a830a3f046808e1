"""The Triton kernels without a GPU: each operation's tests once more, in a process with Triton's interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_OPS = sorted(path.parent.name for path in (_ROOT / "src" / "onepass" / "ops").glob("*/triton"))


_Run = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, list[_Run]]]:
    """Each operation's runs; as many at a time as there are processors, since each keeps one busy."""
    wanted = [item.callspec.params["op"] for item in request.session.items if item.function is test_in_the_interpreter]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {op: [pool.submit(_run, part, request.config.option.seed) for part in _parts(op)] for op in wanted}


def _parts(op: str) -> list[list[str]]:
    """What runs apart: the longest file, the oracle's, and the others."""
    oracle = f"{_ROOT}/tests/{op}/test_{op}_oracle.py"
    return [[oracle], [f"{_ROOT}/tests/{op}", f"--ignore={oracle}"]]


def _run(part: list[str], seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *part, "-q", "-k", "triton"]
    command += ["-p", "no:cacheprovider", "--seed", str(seed)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is Triton's interpreter already")
@pytest.mark.parametrize("op", _OPS)
def test_in_the_interpreter(op: str, runs: dict[str, list[_Run]]) -> None:
    total = 0
    for run in runs[op]:
        result = run.result()
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
        passed = re.search(r"(\d+) passed", result.stdout)
        assert passed is not None, result.stdout
        total += int(passed[1])
    assert total > 20
