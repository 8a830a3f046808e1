"""The weight's gradient between strips of linear_cross_entropy; ops/cross_entropy/carry.py is the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.cross_entropy.carry import lower_bits
from onepass.ops.cross_entropy.triton.config import CARRY


@triton.jit
def _carry_kernel(
    sums_ptr, upper_ptr, lower_ptr, result_ptr, count,
    FIRST: tl.constexpr, LAST: tl.constexpr, LOWER_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
    if not FIRST:
        upper = tl.load(upper_ptr + at, mask=mask, other=0).to(tl.int32)
        if LOWER_BITS == 4:  # two to a byte
            byte = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
            pair = tl.load(lower_ptr + byte, mask=byte * 2 < count, other=0).to(tl.int32)
            lower = tl.interleave(pair & 15, pair >> 4 & 15) << 12
        else:
            lower = tl.load(lower_ptr + at, mask=mask, other=0).to(tl.int32)
            lower = (lower & 0xFF) << 8 if LOWER_BITS == 8 else lower & 0xFFFF
        sums += ((upper << 16) | lower).to(tl.float32, bitcast=True)
    if LAST:
        tl.store(result_ptr + at, sums.to(result_ptr.dtype.element_ty), mask=mask)
    else:
        bits = sums.to(tl.int32, bitcast=True)
        if LOWER_BITS == 4:
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            bits = tl.where(is_nan, 0x7FC00000, bits + 0x800)  # to nearest; a NaN stays one
        tl.store(upper_ptr + at, (bits >> 16).to(tl.int16), mask=mask)
        if LOWER_BITS == 4:
            even, odd = tl.split(tl.reshape(bits >> 12 & 15, (BLOCK // 2, 2)))
            byte = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
            tl.store(lower_ptr + byte, (even | odd << 4).to(tl.uint8), mask=byte * 2 < count)
        elif LOWER_BITS == 8:
            tl.store(lower_ptr + at, ((bits >> 8) & 0xFF).to(tl.uint8), mask=mask)
        else:
            tl.store(lower_ptr + at, bits.to(tl.int16), mask=mask)


_carry = Launcher(_carry_kernel)


def carry(sums: Tensor, lower: Tensor, result: Tensor, first: bool, last: bool) -> None:
    """Adds sums to what result and lower carry; rounds to result the last time."""
    count = sums.numel()
    _carry.launch(
        (triton.cdiv(count, CARRY.block), 1, 1),
        sums.device,
        (sums, result.view(torch.int16), lower, result, count),
        {"FIRST": first, "LAST": last, "LOWER_BITS": lower_bits(lower, sums), "BLOCK": CARRY.block},
        num_warps=CARRY.num_warps,
    )
