"""The interpreter's check of addresses, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import torch
import triton
import triton.language as tl

from onepass.testing import interpreter


@triton.jit
def kernel(x_ptr, y_ptr, rows, stride, counter_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at * stride, mask=at < rows, other=0.0)
    tl.store(y_ptr + at, x, mask=at < rows)
    tl.atomic_add(counter_ptr + rows - 3, 1)


interpreter.patch_language_once()
interpreter.check_bounds()
x, y = torch.arange(8.0)[::2][: int(sys.argv[1])], torch.zeros(int(sys.argv[2]))
kernel[(1,)](x, y, int(sys.argv[3]), x.stride(0), torch.zeros(1, dtype=torch.int32), SIZE=4)
print(y.tolist())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (("3", "3", "3"), "[0.0, 2.0, 4.0]"),
        (("4", "4", "3"), "[0.0, 2.0, 4.0, 0.0]"),
        (("2", "3", "3"), "1 of 3 addresses that are read lie outside"),  # inside x's storage
        (("3", "2", "3"), "1 of 3 addresses that are written lie outside"),
        (("4", "4", "4"), "1 of 1 addresses that are changed lie outside"),
        (("4", "4", "2"), "1 of 1 addresses that are changed lie outside"),
    ],
)
def test_addresses_outside_the_arguments(sizes: tuple[str, str, str], told: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # the interpreter wants to read the kernel's source
    script.write_text(SCRIPT)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *sizes], capture_output=True, text=True, env=environment, check=False
    )
    assert told in done.stdout + done.stderr
    assert (done.returncode == 0) == told.startswith("[")
