"""Tensors as rows: what row-wise operations see of an input with any number of leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """`x` as (rows, columns) with adjacent columns and one stride between rows.

    A view wherever the strides allow it: contiguous tensors, slices of the last dimension, slices of a projection.
    Other strides (a transposed view, an expanded row) are copied first.
    """
    columns = x.shape[-1]
    if x.is_contiguous():
        return x.view(-1, columns) if columns else x.reshape(x.numel(), 0)
    if x.stride(-1) == 1 or columns == 1:
        try:
            return x.view(-1, columns)
        except RuntimeError:
            pass
    return x.contiguous().view(-1, columns)


def as_row(x: Tensor | None) -> Tensor | None:
    """A parameter with adjacent elements; None stays None."""
    return None if x is None else x.contiguous()


def row_stride(x: Tensor) -> tuple[Tensor, int]:
    """`as_rows` for C++, which needs no view: memory that holds x's rows, and the elements from one to the next."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_rows(x)
    return x, x.stride(0)


def empty_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised value for each row: x's shape without its last dimension."""
    return torch.empty(x.shape[:-1], dtype=dtype, device=x.device)
