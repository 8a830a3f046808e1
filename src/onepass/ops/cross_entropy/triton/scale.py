"""A gradient times a number that only the GPU knows: nothing moves when it is 1, as it is for loss.backward()."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from onepass.core.triton_backend import Launcher
from onepass.ops.cross_entropy.triton.config import SCALE


@triton.jit
def _scale_kernel(x_ptr, by_ptr, count, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(by_ptr).to(tl.float32)
    if by != 1.0:
        first = tl.program_id(0).to(tl.int64) * SPAN
        for start in tl.range(0, SPAN, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
            tl.store(x_ptr + at, (x * by).to(x_ptr.dtype.element_ty), mask=at < count)


_scale = Launcher(_scale_kernel)


def scale(gradient: Tensor, by: Tensor) -> None:
    """gradient (contiguous) times a number (), in place."""
    if count := gradient.numel():
        _scale.launch(
            (triton.cdiv(count, SCALE.span), 1, 1),
            gradient.device,
            (gradient, by, count),
            {"SPAN": SCALE.span, "BLOCK": SCALE.block},
            num_warps=SCALE.num_warps,
        )
