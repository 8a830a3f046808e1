"""The Triton kernels without a GPU: each operation's tests once more, in a process with Triton's interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_OPS = sorted(path.parent.name for path in (_ROOT / "src" / "onepass" / "ops").glob("*/triton"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is Triton's interpreter already")
@pytest.mark.parametrize("op", _OPS)
def test_in_the_interpreter(op: str, request: pytest.FixtureRequest) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(_ROOT / "tests" / op),
        "-q",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--seed", str(request.config.option.seed)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) > 20, result.stdout
