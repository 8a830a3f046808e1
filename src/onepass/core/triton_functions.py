"""Device functions that kernels of several operations share; only they import this module.

Running values of a row that is walked in steps stay in their lanes until its end: a lane is a thread, which sees its
own elements of each step alone, so that no step waits for other threads. `by_lane` gives a step that shape.

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
from triton.language.target_info import is_cuda


@triton.jit
def exp(x):
    """e^x of fp32; what is below 2^-126 is 0, without the steps for denormals that double the instructions."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if is_cuda():
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def tanh(u):
    """To a few units in the last place: a series near 0, where 1 - 2 / (exp(2u) + 1) cancels."""
    square = u * u
    near = u * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    far = 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)
    return tl.where(tl.abs(u) < 0.25, near, far)


@triton.jit
def widened(x):
    """fp32 of 16-bit numbers on an NVIDIA GPU; bf16 in one instruction each, where the compiler takes three for two."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def load(ptr, mask, EVEN: tl.constexpr, EVICT: tl.constexpr = None):
    """As fp32; 0 where masked. EVEN: the mask is true everywhere, and costs nothing."""
    if EVEN:
        return tl.load(ptr, eviction_policy=EVICT).to(tl.float32)
    else:
        return tl.load(ptr, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def store(ptr, x, mask, EVEN: tl.constexpr):
    """In the dtype of the memory."""
    if EVEN:
        tl.store(ptr, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def unlike(z, zero):
    """z, in a way that the compiler cannot see: else it would keep the fp32 of an earlier conversion in registers.

    `zero` is an int 0 that the compiler does not know.
    """
    if z.dtype != tl.float32:
        z = (z.to(tl.int16, bitcast=True) ^ zero.to(tl.int16)).to(z.dtype, bitcast=True)
    return z


@triton.jit
def by_lane(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(elements of a step,) as (times, LANES, VECTOR): the middle one is the thread where the step was loaded so."""
    return tl.reshape(x, (x.numel // (LANES * VECTOR), LANES, VECTOR))


@triton.jit
def online_softmax_step(x, largest, total, VECTOR: tl.constexpr):
    """The next elements x of a row: each lane's maximum, and its sum of exp(x - maximum) (Milakov and Gimelshein 2018).

    Start with -inf and 0.
    """
    LANES: tl.constexpr = largest.shape[0]
    x = by_lane(x, LANES, VECTOR)
    before = largest
    largest = tl.maximum(largest, tl.max(tl.max(x, 2), 0))
    shift = tl.where(largest == -float("inf"), 0.0, largest)  # nothing but -inf so far: all terms are 0
    terms = exp(x - shift[None, :, None])
    return largest, total * exp(before - shift) + tl.sum(tl.sum(terms, 2), 0)


@triton.jit
def online_softmax_end(largest, total):
    """The row's maximum (0 where all is -inf) and the sum of exp(x - maximum)."""
    top = tl.max(largest, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.sum(total * exp(largest - top), 0)


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


@triton.jit
def let_next_begin():
    """Launcher.launch's `follows` of the next kernel may take hold from here on: once every program has called this."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_previous():
    """Until the kernel launched before, which this one `follows`, has ended and what it wrote can be read."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch(ptr, count):
    """Asks for `count` bytes of memory to be brought into the L2 cache, and to leave it before others. sm_90 and newer.

    Both are multiples of 16.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 t;
        .reg .b64 policy;
        mov.b32 t, %tid.x;
        setp.eq.b32 p, t, 0;
        setp.ne.and.b32 p, $2, 0, p;
        createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
        @p cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], $2, policy;
        mov.b32 $0, 0;
        }""",
        "=r,l,r", [ptr.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
