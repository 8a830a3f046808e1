"""How the kernels of swiglu and geglu are cut."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class SwigluConfig:
    """A program does block_rows x block_cols elements."""

    block_rows: int
    block_cols: int
    num_warps: int


_FORWARD_BLOCK, _FORWARD_WARPS = 2048, 4
_BACKWARD_BLOCK, _BACKWARD_WARPS = 1024, 4


def forward_config(columns: int) -> SwigluConfig:
    return _cut(columns, _FORWARD_BLOCK, _FORWARD_WARPS)


def backward_config(columns: int) -> SwigluConfig:
    return _cut(columns, _BACKWARD_BLOCK, _BACKWARD_WARPS)


@functools.lru_cache(maxsize=64)
def _cut(columns: int, block: int, num_warps: int) -> SwigluConfig:
    block_cols = min(block, 1 << (columns - 1).bit_length())
    return SwigluConfig(block // block_cols, block_cols, num_warps)
