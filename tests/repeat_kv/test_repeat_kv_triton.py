"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.repeat_kv.triton import repeat

    for dtype in (torch.float32, torch.bfloat16):
        for heads, head_dim in ((2, 128), (3, 33), (1, 3000)):
            x = torch.empty(2, 5, heads, head_dim, dtype=dtype)
            for n_rep in (1, 4):
                repeat.backward(repeat.forward(x, n_rep), n_rep)


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.repeat_kv.triton", _launch)
