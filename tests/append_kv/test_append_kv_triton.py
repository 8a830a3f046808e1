"""append_kv's Triton kernel compiled ahead of time for each target."""

from __future__ import annotations

import pytest
import torch

from onepass.core import device, env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")


def _launch() -> None:
    from onepass.ops.append_kv.triton.append import append

    k, lengths = torch.empty(2, 3, 2, 128, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    cache = torch.empty(8, 16, 2, 128, dtype=torch.bfloat16)
    append(k, k, cache[:2], cache[:2], lengths, None, None, None, None, None)
    append(k, k, cache, cache, lengths, table, None, None, None, None)
    descale = torch.empty(2)
    formats = [torch.int8]
    if device.arch(k) in ("sm_90", "gfx950"):
        formats.append(torch.float8_e4m3fn)
    for dtype in formats:
        quantized = torch.empty(8, 16, 2, 128, dtype=dtype)
        append(k, k, quantized, quantized, lengths, table, descale, descale, None, None)
    int4, pairs = torch.empty(2, 16, 2, 64, dtype=torch.uint8), torch.empty(2, 16, 2, 4, 2, dtype=torch.float16)
    append(k, k, int4, int4, lengths, None, None, None, pairs, pairs)


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.append_kv.triton", _launch)
