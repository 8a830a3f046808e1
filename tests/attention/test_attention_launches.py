"""What launches of attention are made of for GPUs that are not here: which biases come by TMA, what is read ahead."""

from __future__ import annotations

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")

_SEQLEN = 1024  # long enough for TMA


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_nothing_is_read_for_blocks_that_are_not_there(target: str) -> None:
    """33 queries have no whole block of 64, so what would be read ahead of the first is outside the tensor."""
    from onepass.ops.attention.triton import bwd

    q, k = (torch.empty(2, 33, nheads, 32, dtype=torch.bfloat16) for nheads in (7, 1))
    lse = torch.empty(2, 7, 33)
    options = (None,) * 5 + (0.1, -1, -1, True, 0.0, 0.0, False)
    needs = True, True, False, False
    launches = aot.recorded(lambda: bwd.backward(q, None, q, k, k, q, lse, *options, *needs), target)
    assert len(launches) == 3
    for launch in launches:
        assert not aot.unconditional_copies(aot.compiled(launch, target).text), launch.name


_BIASES = {
    "of every score": (torch.empty(2, 4, _SEQLEN, _SEQLEN, dtype=torch.bfloat16), True),
    "of every head": (torch.empty(1, 4, _SEQLEN, _SEQLEN, dtype=torch.bfloat16), True),
    "of all heads": (torch.empty(2, 1, _SEQLEN, _SEQLEN, dtype=torch.bfloat16), True),
    "expanded": (torch.empty(1, 1, _SEQLEN, _SEQLEN, dtype=torch.bfloat16).expand(2, 4, -1, -1), True),
    "heads behind queries": (torch.empty(2, _SEQLEN, 4, _SEQLEN, dtype=torch.bfloat16).transpose(1, 2), True),
    "heads between 16 bytes": (
        torch.empty(2, _SEQLEN, 4, _SEQLEN + 2).bfloat16()[..., :_SEQLEN].transpose(1, 2),
        False,
    ),
    "rows apart": (torch.empty(2, 4, _SEQLEN, _SEQLEN + 8, dtype=torch.bfloat16)[..., :_SEQLEN], True),
    "rows between 16 bytes": (torch.empty(2, 4, _SEQLEN, _SEQLEN + 4, dtype=torch.bfloat16)[..., :_SEQLEN], False),
    "begins between 16 bytes": (torch.empty(2, 4, _SEQLEN, _SEQLEN + 8, dtype=torch.bfloat16)[..., 4:-4], False),
    "transposed": (torch.empty(2, 4, _SEQLEN, _SEQLEN, dtype=torch.bfloat16).transpose(2, 3), False),
    "of every query": (torch.empty(2, 4, _SEQLEN, 1, dtype=torch.bfloat16), False),
    "of every key": (torch.empty(2, 4, 1, _SEQLEN, dtype=torch.bfloat16), False),
    "of fp32": (torch.empty(2, 4, _SEQLEN, _SEQLEN), False),
}


@pytest.mark.parametrize("name", _BIASES)
def test_which_biases_come_by_tma(name: str) -> None:
    from onepass.ops.attention.triton import bwd, fwd
    from onepass.ops.attention.triton.tile import BIAS_BY_TMA

    bias, by_tma = _BIASES[name]
    q = torch.empty(2, _SEQLEN, 4, 64, dtype=torch.bfloat16)
    lse = torch.empty(2, 4, _SEQLEN)
    tensors, numbers = (bias, None, None, None, None), (0.1, -1, -1, True, 0.0, 0.0, False)
    calls = {
        "_fwd_kernel": lambda: fwd.forward(q, q, q, *tensors, *numbers),
        "_keys_bwd_kernel": lambda: bwd.backward(
            q, None, q, q, q, q, lse, *tensors, *numbers, True, True, False, False
        ),
    }
    for target in ("sm_80", "sm_90"):
        for kernel, call in calls.items():
            launch = next(one for one in aot.recorded(call, target) if one.name == kernel)
            assert (launch.constants["BIAS"] == BIAS_BY_TMA.value) == (by_tma and target == "sm_90"), (target, kernel)
