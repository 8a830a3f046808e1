"""Launches of kernels, for whoever watches them: Triton's and the C++ library's tell here what they were given."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple


class Launch(NamedTuple):
    """One launch: a function's address and its arguments as 64-bit words."""

    function: int
    words: tuple[int, ...]
    is_pointer: tuple[bool, ...] | None  # None: the words that are addresses of tensors
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 1
    shared: int = 0
    follows: bool = False  # it may begin before the launch before it has ended

    def pointers(self, known: Mapping[int, object]) -> list[int]:
        """The places of words that are addresses; null pointers are not."""
        if self.is_pointer is None:
            return [i for i, word in enumerate(self.words) if word in known]
        return [i for i, (word, yes) in enumerate(zip(self.words, self.is_pointer, strict=True)) if yes and word]


# By thread, what `watching` collects into; empty while nobody watches, which is all that a launch looks at.
watched: dict[int, list[Launch | None]] = {}


def tell(launch: Launch | None) -> None:
    """Called after a launch while anybody watches; None: it cannot be written down."""
    if (launches := watched.get(threading.get_ident())) is not None:
        launches.append(launch)


@contextmanager
def watching() -> Iterator[list[Launch | None]]:
    """Inside, this thread's launches are collected."""
    thread = threading.get_ident()
    launches: list[Launch | None] = []
    watched[thread] = launches
    try:
        yield launches
    finally:
        del watched[thread]
