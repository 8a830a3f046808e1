"""Triton's kernels compiled ahead of time for each target."""

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.rope.triton import fwd

    tables = [torch.empty(7, 24), torch.empty(2, 7, 24), torch.empty(50, 24)]
    ids = torch.zeros(2, 7, dtype=torch.int64)
    for dtype, interleaved in ((torch.float32, True), (torch.bfloat16, False)):
        q, k = torch.empty(2, 7, 8, 64, dtype=dtype), torch.empty(2, 7, 2, 64, dtype=dtype)
        for table in tables:
            fwd.forward(q, k, table, table, ids if len(table) == 50 else None, interleaved, False)
        fwd.forward(q, k, tables[0], tables[0], None, interleaved, True)
        fwd.forward(q[..., :48], k[..., :48], tables[0], tables[0], None, interleaved, False)
        fwd.forward(q[..., :50], k[..., :50], tables[2], tables[2], ids.int(), interleaved, False)


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.rope.triton", _launch)
