"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.norm.triton import bwd, fwd

    for dtype, parameter, center in ((torch.float32, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)):
        for columns in (33, 4096, 40000, 100000):
            x, rows = torch.empty(3, columns, dtype=dtype), torch.empty(3)
            weight = torch.empty(columns, dtype=parameter)
            bias = weight if center else None
            fwd.forward(x, weight, bias, None, 1e-5, 0.0, center)
            fwd.forward(x, weight, bias, x, 1e-5, 0.0, center, statistics=False)
            bwd.backward(x, x, x, weight, bias, rows, rows, 0.0, center, True, True, center)
            if columns in (33, 100000):
                bwd.backward(x, None, x, None, None, rows, rows, 0.0, center, True, False, False)


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.norm.triton", _launch)
