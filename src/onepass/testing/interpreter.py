"""Triton's interpreter, quicker, and with an eye on memory."""

from __future__ import annotations

from typing import Any

import torch


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


def check_bounds() -> None:
    """From now on a kernel that reads or writes an address that is in none of the tensors that it was launched with
    fails: IndexError.

    A tensor's bytes are those from its first element to its last, strides and all.
    """
    import numpy as np
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    change, exchange = builder.create_atomic_rmw, builder.create_atomic_cas
    begin = executor._init_args_hst
    spans: list[tuple[int, int]] = []  # of the running kernel

    def check(what: str, ptrs: Any, mask: Any) -> None:
        mask = np.broadcast_to(mask.astype(bool), ptrs.data.shape)
        first = ptrs.data[mask].astype(np.int64)
        if not first.size:
            return
        end = first + np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        if any(low <= first.min() and end.max() <= high for low, high in spans):
            return
        inside = np.zeros(first.shape, bool)
        for low, high in spans:
            inside |= (low <= first) & (end <= high)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {first.size} addresses that are {what} lie outside the arguments")

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("read", ptrs, mask.data)
        return load(self, ptrs, mask, *rest, **options)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("written", ptrs, mask.data)
        return store(self, ptrs, value, mask, *rest, **options)

    def checked_change(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("changed", ptr, mask.data)
        return change(self, operation, ptr, value, mask, *rest)

    def checked_exchange(self: Any, ptr: Any, *rest: Any) -> Any:
        check("changed", ptr, np.ones(1, bool))
        return exchange(self, ptr, *rest)

    def remembering(self: Any, arguments: Any, options: Any) -> Any:
        found = begin(self, arguments, options)
        given = (getattr(x, "base", x) for x in (*found[0], *found[1].values()))  # of a descriptor its tensor
        spans[:] = [_span(x) for x in given if isinstance(x, torch.Tensor) and x.numel()]
        return found

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = checked_change, checked_exchange
    executor._init_args_hst = remembering


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize
