"""Device functions that kernels of several operations share; only they import this module.

Sums that programs tell each other through memory, when several share a row:

Every word of the exchange starts as -1. A member writes the two fp32 sums of its columns as one word, the others read
until nothing is -1: a NaN with the bits of -1 never comes out of arithmetic. Programs take a ticket when they start,
and groups are made of tickets in order, so the members that a program waits for are running or will be when an earlier
group is done: nobody waits forever.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def unlike(z, zero):
    """z, in a way that the compiler cannot see: else it would keep the fp32 of an earlier conversion in registers.

    `zero` is an int 0 that the compiler does not know.
    """
    if z.dtype != tl.float32:
        z = (z.to(tl.int16, bitcast=True) ^ zero.to(tl.int16)).to(z.dtype, bitcast=True)
    return z


def start_exchange(rows: int, members: int, device: torch.device) -> Tensor:
    """The ticket counter and a word for each row and member."""
    return torch.full((1 + rows * members,), -1, dtype=torch.int64, device=device)


@triton.jit
def ticket(exchange_ptr):
    """0, 1, 2, ... in the order in which programs start."""
    return (tl.atomic_add(exchange_ptr, 1, sem="relaxed") + 1).to(tl.int32)


@triton.jit
def tell(exchange_ptr, row, rows, member, members, first, second):
    high = first.to(tl.int32, bitcast=True).to(tl.int64) << 32
    low = second.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(exchange_ptr + 1 + row * members + member, high | low, mask=row < rows)


@triton.jit
def collect(exchange_ptr, row, members, MEMBERS: tl.constexpr):
    """The two sums over all members of a row, added in the members' order."""
    member = tl.arange(0, MEMBERS)
    there = member < members
    word_ptr = exchange_ptr + 1 + row * members + member
    # Atomic reads: every thread that holds a copy of a word sees the same.
    word = tl.atomic_or(word_ptr, 0, mask=there, sem="relaxed")
    while tl.min(tl.where(there, word != -1, True).to(tl.int32), 0) == 0:
        word = tl.atomic_or(word_ptr, 0, mask=there, sem="relaxed")
    word = tl.where(there, word, 0)
    first = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    second = word.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(first, 0), tl.sum(second, 0)
