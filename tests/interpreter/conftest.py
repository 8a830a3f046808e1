"""The runs of the interpreter, which begin when the tests are collected: one thread cannot keep the processors busy."""

import importlib.util
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onepass.core import env

_ROOT = Path(__file__).parents[2]


class Runs:
    """pytest once more for the operations' tests, in processes with Triton's interpreter, as many as processors."""

    def __init__(self, ops: list[str], seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._futures = {op: [self._pool.submit(self._run, part) for part in _parts(op)] for op in ops}

    def results(self, op: str) -> list[tuple[int, str]]:
        """Exit status and output of an operation's runs."""
        return [future.result() for future in self._futures[op]]

    def end(self) -> None:
        """What runs is killed, what waits does not begin."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, part: list[str]) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", *part, "-q", "-k", "triton"]
        command += ["-p", "no:cacheprovider", "--seed", str(self._seed)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        with self._lock:
            if self._ended:
                return 1, "ended before it began"
            process = subprocess.Popen(
                command, env=environment, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self._running.add(process)
        output, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        return process.returncode, output


def _parts(op: str) -> list[list[str]]:
    """What runs apart: the longest file, the oracle's, and the others."""
    oracle = f"{_ROOT}/tests/{op}/test_{op}_oracle.py"
    return [[oracle], [f"{_ROOT}/tests/{op}", f"--ignore={oracle}"]]


_RUNS = pytest.StashKey[Runs]()


def pytest_collection_finish(session: pytest.Session) -> None:
    ops = [item.callspec.params["op"] for item in session.items if item.name.startswith("test_in_the_interpreter[")]
    possible = importlib.util.find_spec("triton") is not None and not env.triton_interpreted()
    if ops and possible and not session.config.option.collectonly:
        session.config.stash[_RUNS] = Runs(ops, session.config.option.seed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _RUNS in session.config.stash:
        session.config.stash[_RUNS].end()


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.config.stash[_RUNS]
