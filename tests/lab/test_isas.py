"""Every instruction set that this machine has runs every step, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onepass.core import cpu_library


@pytest.mark.parametrize("isa", cpu_library.isas())
def test_steps(isa):
    tests = Path(__file__).with_name("test_steps.py")
    chosen = "test_shapes or test_nan_stays_in_its_row"
    code = (
        "import sys, pytest; from onepass.core import cpu_library; "
        f"assert cpu_library.isa() == {isa!r}; "
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', {str(tests)!r}, '-k', {chosen!r}]))"
    )
    environment = os.environ | {"ONEPASS_CPU_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
