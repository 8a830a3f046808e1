"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.cross_entropy.carry import empty_lower
    from onepass.ops.cross_entropy.triton import bwd, carry, fwd, reduce, scale

    for dtype in (torch.float32, torch.bfloat16):
        for classes in (33, 32000):
            logits, target, rows = (
                torch.empty(3, classes, dtype=dtype),
                torch.zeros(3, dtype=torch.int64),
                torch.zeros(3),
            )
            for options, dlse in (((0.0, 0.0, 0.0), None), ((0.1, 0.1, 3.0), rows)):
                fwd.forward(logits, target, -100, *options)
                bwd.backward(rows, dlse, logits, target, rows, -100, *options)
    for count in (3, 100000):
        for mean in (True, False):
            reduce.reduce(torch.zeros(count), torch.zeros(count, dtype=torch.int64), -100, mean)
    sums = torch.zeros(4, 16)
    for bits in (4, 8, 16):
        for first, last in ((True, False), (False, False), (False, True)):
            carry.carry(sums, empty_lower(sums, bits), sums.bfloat16(), first, last)
    scale.scale(sums, torch.ones(()))


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.cross_entropy.triton", _launch)
