"""How a backend is chosen: tables of kernels, the reasons each refuses a call, and one cached lookup.

An operation's `kernels.py` holds one `KernelTable` per direction (forward, backward, ...). A spec is a hashable tuple
of the facts the choice depends on, never raw lengths, so the cache stays small and a call costs one dictionary lookup.
"""

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from onepass.core.errors import UnsupportedError

Launcher = Callable[..., Any]


def _no_reasons(spec: Any) -> list[str]:
    return []


def _always_there() -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One row of a table.

    `unsupported(spec)` gives the reasons for which the kernel cannot do a call, whatever the machine; `unavailable()`
    says why it cannot run on this machine; `slow(spec)` what it does, but slowly. Documentation shows what it does on
    the architecture `shown_on`.

    `launcher` is the import path "module:function"; the module is imported when the kernel is first chosen.
    """

    backend: str
    priority: int
    unsupported: Callable[[Any], list[str]]
    launcher: str
    slow: Callable[[Any], list[str]] = _no_reasons
    unavailable: Callable[[], str | None] = _always_there
    by_name_only: bool = False
    shown_on: str = "cpu"

    def load(self) -> Launcher:
        module, _, function = self.launcher.partition(":")
        launcher: Launcher = getattr(importlib.import_module(module), function)
        return launcher


@dataclass(frozen=True)
class Verdict:
    """What one kernel says to one spec."""

    backend: str
    reasons: list[str]
    slow: list[str]


@dataclass(frozen=True)
class Choice:
    """Which kernel of a table takes a spec, and why each other one does not."""

    op: str
    backend: str | None
    verdicts: list[Verdict]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can do this call'}"]
        for verdict in self.verdicts:
            if verdict.backend == self.backend:
                lines += [f"  {verdict.backend}: chosen", *(f"    slow: {remark}" for remark in verdict.slow)]
            else:
                lines.append(f"  {verdict.backend}: {'; '.join(verdict.reasons)}")
        return "\n".join(lines)


@dataclass
class KernelTable:
    """The kernels of one direction of one operation, the highest priority first.

    `spec` is the NamedTuple that the kernels judge. A call brings its fields as a plain tuple, which is equal to it and
    costs half as much to make.
    """

    op: str
    spec: Callable[..., Any]
    kernels: Sequence[Kernel]
    launchers: dict[tuple[tuple[Any, ...], str], Launcher] = field(default_factory=dict, repr=False)
    when_forgotten: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.kernels = sorted(self.kernels, key=lambda kernel: -kernel.priority)

    @property
    def backends(self) -> list[str]:
        return [kernel.backend for kernel in self.kernels]

    @property
    def usable(self) -> list[str]:
        """The backends that this machine can run."""
        return [kernel.backend for kernel in self.kernels if kernel.unavailable() is None]

    def forget(self) -> None:
        """Drops the cached choices, and what others keep that rests on them (for tests that replace a launcher)."""
        self.launchers.clear()
        for forget in self.when_forgotten:
            forget()


@dataclass(frozen=True)
class SupportTable:
    """What the documentation shows of a kernel table: a spec for each feature a reader asks about."""

    title: str
    table: KernelTable
    features: Callable[[], Mapping[str, Any]]


def select(table: KernelTable, facts: tuple[Any, ...], backend: str = "") -> Launcher:
    """The launcher that takes a call: the best kernel without reasons against it, or the one named by `backend`.

    Raises UnsupportedError with every kernel's reasons when none can, ValueError for a name the table lacks.
    """
    launcher = table.launchers.get((facts, backend))
    return _first_select(table, facts, backend) if launcher is None else launcher


def _first_select(table: KernelTable, facts: tuple[Any, ...], backend: str) -> Launcher:
    choice = choose(table, facts, backend)
    if choice.backend is None:
        raise UnsupportedError(f"{choice}\n  the call: {_describe(table.spec(*facts))}")
    kernel = next(kernel for kernel in table.kernels if kernel.backend == choice.backend)
    launcher = table.launchers[facts, backend] = kernel.load()
    return launcher


def choose(table: KernelTable, facts: tuple[Any, ...], backend: str = "") -> Choice:
    """Every kernel's verdict on a call, and the winner's name."""
    if backend and backend not in table.backends:
        raise ValueError(f"backend={backend!r} is unknown to {table.op}: its backends are {', '.join(table.backends)}")
    spec = table.spec(*facts)
    chosen: str | None = None
    verdicts = []
    for kernel in table.kernels:
        reasons = kernel.unsupported(spec)
        if not reasons and (missing := kernel.unavailable()) is not None:
            reasons = [missing]
        if not reasons:
            if backend and kernel.backend != backend:
                reasons = [f"backend={backend!r} was asked for"]
            elif kernel.by_name_only and not backend:
                reasons = [f"used only when asked for by name (backend={kernel.backend!r})"]
            elif chosen is not None:
                reasons = [f"{chosen} has the higher priority"]
            else:
                chosen = kernel.backend
        verdicts.append(Verdict(kernel.backend, reasons, kernel.slow(spec)))
    return Choice(table.op, chosen, verdicts)


def _describe(spec: Any) -> str:
    fields = spec._asdict()
    return ", ".join(f"{name}={value}" for name, value in fields.items() if value is not False)


class _InUse(threading.local):
    """What `use_backend` has set; "" leaves the choice to the tables. torch.compile traces and guards it."""

    def __init__(self) -> None:
        self.backend = ""


_in_use = _InUse()


def backend_in_use() -> str:
    """The name that `use_backend` has set, or "". Each operation's api.py alone asks."""
    return _in_use.backend


class use_backend:
    """Context manager: inside it every operation uses the backend `name`, or raises UnsupportedError.

    The name is resolved when an operation is called and travels with it into its backward. An argument `backend=` of a
    call goes before it. The setting belongs to the current thread.

        with onepass.use_backend("reference"):
            out = onepass.attention(q, k, v)
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"use_backend takes a backend's name, for example 'cpu', got {name!r}")
        self.name = name
        self._before: list[str] = []

    def __enter__(self) -> "use_backend":
        self._before.append(_in_use.backend)
        _in_use.backend = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _in_use.backend = self._before.pop()


# explain("attention", ...) finds here what to ask; each operation's api.py adds its own.
_explainers: dict[str, Callable[..., list[Choice]]] = {}


def explains(op: str) -> Callable[[Callable[..., list[Choice]]], Callable[..., list[Choice]]]:
    """Decorator of a function that takes a public function's arguments and returns the choices it would make."""

    def add(function: Callable[..., list[Choice]]) -> Callable[..., list[Choice]]:
        _explainers[op] = function
        return function

    return add


class Explanation(list[Choice]):
    """The choices one call makes, one for each kernel it needs; printing it reads as a report."""

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self)

    __repr__ = __str__

    @property
    def backends(self) -> Iterator[str | None]:
        return (choice.backend for choice in self)


def explain(op: str, *args: Any, **options: Any) -> Explanation:
    """What `onepass.<op>(*args, **options)` would run, and why each other backend was not chosen. Nothing is computed.

        >>> print(onepass.explain("attention", q, k, v, causal=True))
        attention forward: cpu
          cpu: chosen
          reference: used only when asked for by name (backend='reference')

    Arguments are checked as the call itself checks them. Raises ValueError for an unknown operation, TypeError for
    missing arguments.
    """
    if op not in _explainers:
        raise ValueError(f"explain knows no operation {op!r}: choose from {', '.join(sorted(_explainers))}")
    try:
        inspect.signature(_explainers[op]).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"explain({op!r}, ...): {error}; give it the arguments of onepass.{op}") from None
    return Explanation(_explainers[op](*args, **options))
