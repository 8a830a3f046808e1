"""Every Triton kernel under compute-sanitizer: no read or write outside an allocation, each tensor being one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHARES = 8  # processes, of which pytest-xdist runs some side by side


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_nothing_outside_allocations_is_touched(share: int) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on the PATH (it comes with CUDA)")
    driver = Path(__file__).with_name("memcheck_driver.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(driver)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, str(share), str(SHARES)], capture_output=True, text=True, env=environment, check=False
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this GPU here: some virtual machines hide what it needs")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    ran = re.search(r"(\d+) cases ran", done.stdout)
    assert ran is not None
    assert int(ran[1]) > 20
