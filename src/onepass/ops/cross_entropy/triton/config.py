"""How the cross-entropy kernels are cut, by the number of classes. Every constant that tuning may change is here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CrossEntropyConfig:
    """block_rows x block_cols logits are held at a time; wider rows are walked in steps of block_cols."""

    block_rows: int
    block_cols: int
    num_warps: int
    stages: int = 1  # steps that are loaded ahead
    columns_per_program: int = 0  # backward only: a row is shared by several programs; 0: it is not


@dataclass(frozen=True)
class ReduceConfig:
    """rows_per_program losses to one partial sum; a single program finishes at once."""

    rows_per_program: int = 16384
    block: int = 4096
    num_warps: int = 16


_WIDE = 2048  # classes
VECTOR_BYTES = 16  # a thread's load
# On an H200, bf16, 8192 rows: 4010 and 4400 GB/s at 32000 and 128256 classes; 3920 and 4000 backward.
FORWARD_WIDE = CrossEntropyConfig(1, 8192, 8)
_BACKWARD_WIDE = CrossEntropyConfig(1, 2048, 4, stages=3, columns_per_program=16384)


@dataclass(frozen=True)
class CarryConfig:
    """Elements of the weight's gradient to a program."""

    block: int = 4096
    num_warps: int = 8


REDUCE = ReduceConfig()
CARRY = CarryConfig()


@dataclass(frozen=True)
class ScaleConfig:
    """span elements to a program: few programs, for the usual case that there is nothing to do."""

    span: int = 1 << 17
    block: int = 4096
    num_warps: int = 8


SCALE = ScaleConfig()


def forward_rows(classes: int) -> CrossEntropyConfig | None:
    """None: the row is walked (FORWARD_WIDE)."""
    return None if classes > _WIDE else _whole_row(classes)


def backward_config(classes: int) -> CrossEntropyConfig:
    return _BACKWARD_WIDE if classes > _WIDE else _whole_row(classes)


def _whole_row(classes: int) -> CrossEntropyConfig:
    block_cols = max(16, 1 << (classes - 1).bit_length())
    block_rows = max(1, min(16, 2048 // block_cols))
    return CrossEntropyConfig(block_rows, block_cols, max(1, min(4, block_rows * block_cols // 512)))
