"""How the norm kernels are cut, by the number of columns; the figures are an H200's, in bf16 (docs/kernels/norm.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsConfig:
    """A tile of whole rows in registers."""

    block_rows: int
    block_cols: int
    num_warps: int
    # Of kernels that go through many tiles each.
    programs_per_sm: int = 0
    stages: int = 3  # tiles that are loaded ahead


@dataclass(frozen=True)
class WideConfig:
    """Rows that are walked in steps of block_cols."""

    block_cols: int
    num_warps: int


LARGEST_TILE = 16384  # columns of a row that one tile holds
_HELD_BYTES = 128 << 10  # of a row that the registers of one multiprocessor hold in its own dtype


def forward_rows(columns: int, center: bool) -> RowsConfig:
    """3700, 4080 and 4010 GB/s at 1024, 4096 and 8192 columns (centred 3700, 4060 and 4010)."""
    cols = _power_of_two(columns)
    if cols < 4096:
        rows = max(1, min(32, 2048 // cols))
        return RowsConfig(rows, cols, _warps(rows * cols, per_thread=16))
    rows = 1 if cols > 4096 else 2 if center else 4
    return RowsConfig(rows, cols, _warps(rows * cols, per_thread=32 if cols > 4096 else 64))


def forward_rereads(columns: int, center: bool) -> bool:
    """Rows that are walked twice although a tile would hold them: fewer registers, more programs at once.

    4100 GB/s at 8192 columns instead of 3970; centred it costs more than it gains.
    """
    return not center and 4096 < columns <= LARGEST_TILE


def forward_held(columns: int, itemsize: int, center: bool) -> WideConfig | None:
    """Wider rows that the registers still hold, unconverted; None when they do not.

    4070 GB/s at 65536 columns; centred, with a pass over the registers more, 3250.
    """
    return WideConfig(8192 if center else 16384, 32) if columns * itemsize <= _HELD_BYTES else None


FORWARD_WIDE = WideConfig(4096, 16)


def backward_rows(columns: int) -> RowsConfig:
    """3350, 4000 and 3960 GB/s at 1024, 4096 and 8192 columns."""
    cols = _power_of_two(columns)
    if cols < 4096:
        return RowsConfig(max(1, min(16, 2048 // cols)), cols, 4, 2, stages=5)
    return RowsConfig(max(1, 8192 // cols), cols, 16, 1)


# 3370 GB/s at 65536 columns (centred 3140). Four programs share a multiprocessor.
BACKWARD_WIDE = WideConfig(2048, 2)
BACKWARD_WIDE_PROGRAMS_PER_SM = 4


def partials_block(partials: int) -> tuple[int, int]:
    """Partials and columns of a block: all partials at once where possible, so that memory is waited for once."""
    parts = min(512, max(32, 1 << (partials - 1).bit_length()))
    return parts, 8192 // parts


def _power_of_two(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())


def _warps(elements: int, per_thread: int) -> int:
    return max(1, min(16, elements // (32 * per_thread)))
