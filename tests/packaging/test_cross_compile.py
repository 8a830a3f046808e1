"""The generic build compiles for aarch64 where a cross compiler is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = (sys.executable, "-m", "cmake")  # the one that the environment brings
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed (Debian: apt install g++-aarch64-linux-gnu)"
)
def test_generic_build_compiles_for_aarch64(tmp_path):
    configure = [
        *CMAKE, "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    ]  # fmt: skip
    for command in (configure, [*CMAKE, "--build", str(tmp_path), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stderr
    library = tmp_path / "libonepass_cpu.so"
    machine = int.from_bytes(library.read_bytes()[18:20], "little")
    assert machine == 183  # EM_AARCH64
