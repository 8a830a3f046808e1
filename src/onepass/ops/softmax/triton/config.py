"""How the softmax kernels are cut, by the number of columns. Every constant that tuning may change is here."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SoftmaxConfig:
    """block_rows x block_cols elements are held at a time; rows wider than block_cols are walked in steps of it."""

    block_rows: int
    block_cols: int
    num_warps: int
    # Rows wider than block_cols only.
    stages: int = 1  # steps that are loaded ahead
    programs_per_processor: int = 0  # rows in flight on a multiprocessor: they must fit the cache; 0: a program a row

    def even(self, rows: int, columns: int) -> dict[str, bool]:
        """Whether blocks of whole rows have nothing to mask."""
        return {"EVEN": rows % self.block_rows == 0 and columns == self.block_cols}


@dataclass(frozen=True)
class HeldConfig:
    """Rows that the registers hold step by step, in their own dtype."""

    block_cols: int
    num_warps: int


@dataclass(frozen=True)
class SharedConfig:
    """Rows that a group of programs shares, block_cols columns each."""

    block_cols: int
    num_warps: int
    programs_per_processor: int


@dataclass(frozen=True)
class RingConfig:
    """Rows that pass through a ring of stages in shared memory; `most_bytes` of a row leave some for the next one."""

    stage_bytes: int
    stages: int
    num_warps: int
    most_bytes: int


_MOST_WARPS = 32 if torch.version.hip is None else 16  # a block has 1024 threads at most
_FORWARD_WHOLE_ROW = 32768  # the widest row that is held in registers
_BACKWARD_WHOLE_ROW = 16384
_FORWARD_WIDE = SoftmaxConfig(1, 8192, _MOST_WARPS, stages=1, programs_per_processor=2)
_HELD_BYTES = 128 << 10  # of a row that the registers of one multiprocessor hold

VECTOR_BYTES = 16  # a thread's load
RING = RingConfig(16 << 10, 12, 16, 160 << 10)
FORWARD_HELD = HeldConfig(4096, _MOST_WARPS)
BACKWARD_WIDE = SharedConfig(2048, 4, 4)


def forward_config(columns: int) -> SoftmaxConfig:
    return _FORWARD_WIDE if wide(columns) else _whole_row(columns, elements_per_thread=16)


def wide(columns: int) -> bool:
    return columns > _FORWARD_WHOLE_ROW


def held(columns: int, itemsize: int) -> bool:
    return wide(columns) and columns <= _HELD_BYTES // itemsize


def backward_config(columns: int) -> SoftmaxConfig | None:
    """None: the row is shared (BACKWARD_WIDE)."""
    if columns > _BACKWARD_WHOLE_ROW:
        return None
    return _whole_row(columns, elements_per_thread=8 if 2048 < columns <= 4096 else 16)


def _whole_row(columns: int, elements_per_thread: int) -> SoftmaxConfig:
    block_cols = max(16, 1 << (columns - 1).bit_length())
    block_rows = max(1, min(16, 4096 // block_cols))
    warps = block_rows * block_cols // elements_per_thread // 32
    return SoftmaxConfig(block_rows, block_cols, max(1, min(_MOST_WARPS, warps)))
