"""How the norm kernels are cut, by the number of columns. Measured on an H200, bf16 (docs/kernels/norm.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NormConfig:
    """block_rows x block_cols elements are held at a time; rows wider than block_cols are walked in steps of it."""

    block_rows: int
    block_cols: int
    num_warps: int


_WHOLE_ROW = 16384  # the widest row that is held in registers


def forward_config(columns: int) -> NormConfig:
    if columns > _WHOLE_ROW:
        return NormConfig(1, 8192, 16)
    return _whole_row(columns, elements_per_thread=16)


def backward_config(columns: int) -> NormConfig:
    if columns > _WHOLE_ROW:
        return NormConfig(1, 8192, 16)
    return _whole_row(columns, elements_per_thread=16)


def _whole_row(columns: int, elements_per_thread: int) -> NormConfig:
    block_cols = max(16, 1 << (columns - 1).bit_length())
    block_rows = max(1, min(16, 4096 // block_cols))
    threads = block_rows * block_cols // elements_per_thread
    return NormConfig(block_rows, block_cols, max(1, min(16, threads // 32)))
