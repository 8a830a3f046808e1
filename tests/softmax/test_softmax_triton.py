"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import device, env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.softmax.triton import bwd, fwd, ring

    for dtype in (torch.float32, torch.bfloat16):
        for columns in (33, 4096, 50000, 70000):
            x = torch.empty(3, columns, dtype=dtype)
            bwd.backward(x, fwd.forward(x))
        if device.arch(x) in ("sm_90", "sm_100"):  # the others have less shared memory, and ring.takes says no
            for columns in (36000, 32768):
                ring.forward(torch.empty(3, columns, dtype=dtype), torch.empty(3, columns, dtype=dtype))


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.softmax.triton", _launch)
