"""Planted faults: a backend's kernel replaced for the length of a block, to prove that a test notices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from onepass.core import replay
from onepass.core.registry import KernelTable, Launcher


@contextmanager
def replaced(table: KernelTable, backend: str, change: Callable[[Launcher], Launcher]) -> Iterator[None]:
    """Inside, `change(launcher)` runs instead of the backend's launcher.

    with replaced(kernels.FORWARD, "cpu", lambda forward: lambda *args: tuple(x * 2 for x in forward(*args))): ...
    """
    kernel = next(kernel for kernel in table.kernels if kernel.backend == backend)
    broken = change(kernel.load())

    class Planted(dict[Any, Any]):
        """Every lookup that would choose `backend` finds the broken launcher."""

        def get(self, key: Any, default: Any = None) -> Any:
            from onepass.core.registry import choose

            facts, wanted = key
            return broken if choose(table, facts, wanted).backend == backend else default

    whole = table.launchers
    table.launchers = Planted()
    try:
        with replay.paused():
            yield
    finally:
        table.launchers = whole
