"""Work that begins when tests are collected, beside those that one thread works through, until a test asks for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any


class Background:
    """Functions by name, each in a thread, as many at a time as there are processors.

    A test file asks for it with a function `begin_in_background(background, items)`, which is given the file's
    collected tests; the fixture `background` has the results. Processes have the environment given here and the folder
    of the moment of collection, whatever tests change meanwhile.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._results: dict[str, Future[Any]] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="onepass-tests-")
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ended = False
        self.environment = dict(environment)
        self._cwd = Path.cwd()

    def begin(self, name: str, work: Callable[[], Any]) -> None:
        if name in self._results:
            raise ValueError(f"{name!r} has begun already")
        self._results[name] = self._pool.submit(work)

    def result(self, name: str) -> Any:
        """What the function returned or raised, once it has."""
        return self._results[name].result()

    def folder(self, name: str) -> Path:
        """A new folder until the tests end."""
        folder = Path(self._temporary.name) / name
        folder.mkdir()
        return folder

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A process with both of its outputs in one, which is killed with its own when the tests end before it."""
        with self._lock:
            if self._ended:
                raise RuntimeError("the tests have ended")
            process = subprocess.Popen(
                command,
                env=self.environment if environment is None else environment,
                cwd=self._cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        output, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def end(self) -> None:
        """What runs is killed, what waits does not begin."""
        with self._lock:
            self._ended = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self._pool.shutdown(cancel_futures=True)
        self._temporary.cleanup()
