"""Triton's interpreter, quicker."""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """The interpreter replaces the functions of triton.language that a kernel's module sees, and again those that a
    device function's module sees at each of its calls, a fifth of the time of small tiles: here once in a launch.
    """
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    replaced: set[str] = set()  # of the running kernel

    def replace_once(fn: Any) -> Any:
        modules = {value.__name__ for value in fn.__globals__.values() if value is language or value is language.core}
        if replaced and modules <= replaced:
            return interpreter._LangPatchScope()
        scope = replace(fn)
        if not replaced:  # the kernel's own scope, which the interpreter ends with it
            restore = scope.restore

            def restore_all() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_all
        replaced.update(modules)
        return scope

    interpreter._patch_lang = replace_once
