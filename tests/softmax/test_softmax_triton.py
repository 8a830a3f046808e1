"""Triton's kernels without a GPU: interpreted in a process of their own, compiled ahead of time for each target."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onepass.core import env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="this process is the one that interprets")

_FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these tests itself")
@pytest.mark.parametrize("part", ["oracle", "properties", "faults", "bad_input"])
def test_interpreted(part: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", f"--seed={seed}"]
    done = subprocess.run([*command, f"{_FOLDER}/test_softmax_{part}.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


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
