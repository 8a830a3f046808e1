"""Every Triton kernel compiled with the installed Triton, for every target, and with the oldest and the newest that
onepass supports, which scripts/install.sh puts beside it.

A process runs each operation's own test of it, beside the other tests, which one thread works through.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onepass.core import env
from onepass.testing.background import Background

_ROOT = Path(__file__).parents[2]
_TESTS = sorted(str(path) for path in (_ROOT / "tests").glob("*/test_*_triton.py"))
INSTALLED = "installed"
_FEWER = ("--aot-targets=sm_90,gfx950", "--aot-share-out")
_OPTIONS: dict[str, tuple[str, ...]] = {INSTALLED: (), "oldest": _FEWER, "newest": _FEWER}
_VERSION = "import triton; print(triton.__version__)"


def _folder(name: str) -> Path:
    return Path(sys.prefix) / "triton" / name


def _environment(name: str) -> dict[str, str]:
    if name == INSTALLED:
        return dict(os.environ)
    paths = [str(_folder(name)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _version(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", _VERSION]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


@functools.cache  # asked at collection and by the test; each answer takes two processes
def _missing(name: str) -> str:
    """Why there is nothing to compile with; "" if there is."""
    if env.triton_interpreted():
        return "interpreted kernels are not compiled"
    if name == INSTALLED:
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"
    if not _folder(name).exists():
        return f"there is no {_folder(name)}: scripts/install.sh dev makes it"
    version = _version(_environment(name))
    return f"Triton {version} is the installed one" if version == _version(dict(os.environ)) else ""


def begin_in_background(background: Background, items: list[pytest.Function]) -> None:
    for item in items:
        name, chosen = item.callspec.params["name"], item.config.option
        if not _missing(name):
            shared = ("--aot-share-out",) if chosen.aot_share_out else ()
            options = _OPTIONS[name] or (f"--aot-targets={chosen.aot_targets}", *shared)
            command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *_TESTS)
            background.begin(name, functools.partial(background.run, command, _environment(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", _OPTIONS)
def test_compiles_with_the(name: str, background: Background) -> None:
    missing = _missing(name)
    if missing:
        pytest.skip(missing)
    result = background.result(name)
    assert result.returncode == 0, f"Triton {_version(_environment(name))}\n" + result.stdout[-10000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) == len(_TESTS), result.stdout
