"""Every Triton kernel compiled with the oldest and the newest Triton that onepass supports.

The installed one compiles them in each operation's own tests; scripts/install.sh puts these two beside it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onepass.core import env

_ROOT = Path(__file__).parents[2]
_TARGETS = ("--aot-targets=sm_90,gfx950", "--aot-in-turn")  # every launch for all six with the installed Triton
_VERSION = "import triton; print(triton.__version__)"


def _version(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", _VERSION]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_compiles_with_the(name: str) -> None:
    folder = Path(sys.prefix) / "triton" / name
    if not folder.exists():
        pytest.skip(f"there is no {folder}: scripts/install.sh dev makes it")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    version = _version(environment)
    if version == _version(dict(os.environ)):
        pytest.skip(f"Triton {version} is the installed one")
    tests = sorted(str(path) for path in (_ROOT / "tests").glob("*/test_*_triton.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TARGETS, *tests]
    result = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"Triton {version}\n" + result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) == len(tests), result.stdout
