"""What testing/background.py promises: results by name, errors told, nothing left running."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onepass.testing.background import Background


@pytest.fixture
def own() -> Iterator[Background]:
    background = Background(os.environ)
    yield background
    background.end()


def test_results_and_errors_reach_who_asks(own: Background) -> None:
    own.begin("sum", lambda: 1 + 2)
    own.begin("fault", lambda: 1 // 0)
    assert own.result("sum") == 3
    with pytest.raises(ZeroDivisionError):
        own.result("fault")
    with pytest.raises(ValueError, match="'sum' has begun already"):
        own.begin("sum", lambda: 0)


def test_processes_see_the_environment_of_the_beginning(own: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPASS_TEST_VARIABLE", "later")
    code = "import os, sys; print(os.environ.get('ONEPASS_TEST_VARIABLE')); sys.exit(3)"
    done = own.run((sys.executable, "-c", code))
    assert (done.returncode, done.stdout.strip()) == (3, "None")


def test_nothing_is_left(tmp_path: Path) -> None:
    """Not the process, not what it began, not the folder."""
    background = Background(os.environ)
    folder, file = background.folder("some"), tmp_path / "pid"
    background.begin(
        "sleep", lambda: background.run(("sh", "-c", f"sleep 60 & echo $! > {file}.part; mv {file}.part {file}; wait"))
    )
    while not file.exists():
        time.sleep(0.01)
    background.end()
    assert background.result("sleep").returncode < 0
    assert not folder.exists()
    pid = int(file.read_text())
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
            break
        time.sleep(0.01)
    else:
        os.kill(pid, 9)
        pytest.fail("what the process began goes on")
    with pytest.raises(RuntimeError, match="have ended"):
        background.run(("true",))
