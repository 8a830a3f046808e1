"""How linear_cross_entropy is cut. Every constant that tuning may change is here.

Strips of rows (their logits hold all classes) are what lse needs, strips of classes (all rows) are what the weight's
gradient wants: one product over all rows, accumulated in fp32 inside, and nothing carried from strip to strip.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearPlan:
    """Strips as bytes of logits held at a time."""

    now_bytes: int  # strips of rows, gradients made at once: the fewer, the less the weight's gradient is carried
    pair_bytes: int  # the same where it makes two strips, for a bf16 weight; 0: never
    rows_bytes: int  # strips of rows, lse alone
    classes_bytes: int  # strips of classes
    weight_slice: int  # classes of the weight's gradient added to at a time
    carry_bytes: int  # of fp32's 4 bytes, how many of the weight's gradient are carried between strips: 3 or 4


# 3 bytes keep 16 bits of mantissa, 256 times finer than the bf16 that comes out, and save a quarter of the buffer. Two
# strips carry once: 12 bits rounded to nearest, 16 times finer than bf16, leave room for strips of half the rows.
# An fp32 slice of 2048 classes and 4096 features stays in the cache between the product and the sum.
_GPU = LinearPlan(
    now_bytes=700 << 20,
    pair_bytes=1008 << 20,
    rows_bytes=256 << 20,
    classes_bytes=64 << 20,
    weight_slice=2048,
    carry_bytes=3,
)
_CPU = LinearPlan(
    now_bytes=64 << 20,
    pair_bytes=0,
    rows_bytes=64 << 20,
    classes_bytes=32 << 20,
    weight_slice=4096,
    carry_bytes=4,
)


def plan(device: torch.device) -> LinearPlan:
    return _CPU if device.type == "cpu" else _GPU


def strips(total: int, bytes_each: int, bytes_at_once: int, multiple: int) -> list[tuple[int, int]]:
    """(start, end) of strips of nearly equal length, a multiple of `multiple` where there are several."""
    most = max(multiple, bytes_at_once // bytes_each // multiple * multiple)
    count = -(-total // most)
    length = -(-total // max(1, count))
    length = -(-length // multiple) * multiple
    return [(start, min(start + length, total)) for start in range(0, total, max(1, length))]


def now_strips(
    rows: int, row_bytes: int, cut: LinearPlan, weight: torch.Tensor, multiple: int
) -> tuple[list[tuple[int, int]], int]:
    """Strips of rows whose gradients are made at once, and how many bits of the weight's gradient are carried below the
    upper 16 of fp32's 32.
    """
    parts = strips(rows, row_bytes, cut.now_bytes, multiple)
    if len(parts) > 2 and cut.pair_bytes and weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0:
        pair = strips(rows, row_bytes, cut.pair_bytes, multiple)
        if len(pair) == 2:
            return pair, 4
    return parts, 8 * (cut.carry_bytes - 2)
