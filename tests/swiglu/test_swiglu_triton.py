"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.swiglu.spec import ACTIVATIONS
    from onepass.ops.swiglu.triton import bwd, fwd

    for dtype in (torch.float32, torch.bfloat16):
        for activation in ACTIVATIONS:
            for gate, up in (torch.empty(2, 3, 96, dtype=dtype), torch.empty(3, 2 * 4096, dtype=dtype).chunk(2, -1)):
                fwd.forward(gate, up, activation)
                bwd.backward(gate, gate, up, activation, True, True)
            bwd.backward(gate, gate, up, activation, True, False)


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.swiglu.triton", _launch)
