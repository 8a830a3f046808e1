"""Every Triton kernel under compute-sanitizer: no read or write outside an allocation, each tensor being one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHARES = 8  # processes, of which pytest-xdist runs some side by side
_A_KERNEL = "import torch; torch.ones(1, device='cuda').add_(1); torch.cuda.synchronize()"


def _memcheck(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on the PATH (it comes with CUDA)")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, *arguments]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module", autouse=True)
def _works() -> None:
    done = _memcheck("-c", _A_KERNEL)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this GPU here: some virtual machines hide what it needs")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_nothing_outside_allocations_is_touched(share: int) -> None:
    done = _memcheck(str(Path(__file__).with_name("memcheck_driver.py")), str(share), str(SHARES))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    ran = re.search(r"(\d+) cases ran", done.stdout)
    assert ran is not None
    assert int(ran[1]) > 20
