"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.softmax.triton import bwd, fwd

    for dtype in (torch.float32, torch.bfloat16):
        for columns in (33, 4096, 50000, 70000):
            x = torch.empty(3, columns, dtype=dtype)
            bwd.backward(x, fwd.forward(x))


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_for(target: str) -> None:
    launches = aot.recorded(_launch)
    assert {launch.name for launch in launches} == {
        "_rows_fwd_kernel",
        "_held_fwd_kernel",
        "_wide_fwd_kernel",
        "_rows_bwd_kernel",
        "_shared_bwd_kernel",
    }
    for launch in launches:
        assert launch.name in aot.compiled(launch, target)
