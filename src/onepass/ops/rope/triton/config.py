"""How rope's kernel is cut."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """A program turns block_tokens x block_heads x block_half pairs of q or of k.

    table_per_head: cos and sin are read for each head, from the cache; else once for each token and handed around.
    """

    block_tokens_q: int
    block_heads_q: int
    block_tokens_k: int
    block_heads_k: int
    block_half: int
    num_warps: int
    table_per_head: bool


_PAIRS, _WARPS = 1024, 4
MOST_REGISTERS = 48  # on an H200 4035 GB/s, 3985 without the limit
_MOST_HEADS = 16
_TABLE_PER_HEAD = False


@functools.lru_cache(maxsize=64)
def forward_config(nheads_q: int, nheads_kv: int, half: int) -> RopeConfig:
    block_half = _power_of_two(half)
    tile_q, tile_k = _tile(nheads_q, block_half), _tile(nheads_kv, block_half)
    return RopeConfig(*tile_q, *tile_k, block_half, _WARPS, _TABLE_PER_HEAD)


def _tile(heads: int, block_half: int) -> tuple[int, int]:
    """Tokens and heads: heads that lie beside each other come first, in a block that divides their number if any."""
    rows = max(1, _PAIRS // block_half)
    dividing = heads & -heads
    block_heads = dividing if dividing >= 4 else _power_of_two(max(1, heads))
    block_heads = min(block_heads, rows, _MOST_HEADS)
    return rows // block_heads, block_heads


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
