"""The C++ kernels under AddressSanitizer, those of the first instruction set under UBSan, too: out-of-bounds reads and
writes and undefined arithmetic end the run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onepass.core import cpu_library
from onepass.testing.background import Background

ROOT = Path(__file__).parents[2]
CMAKE = (sys.executable, "-m", "cmake")  # the one that the environment brings
REPORTS = ("AddressSanitizer", "runtime error:")


def runtime(name: str) -> Path:
    """A sanitizer's runtime as the compiler finds it; skips where it is not installed."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{name} is not installed beside g++")
    return Path(found).resolve()


def begin_in_background(background: Background, items: list[pytest.Function]) -> None:
    """The C++ library built with both sanitizers."""

    def build() -> Path:
        folder = background.folder("sanitized")
        configure = [*CMAKE, "-S", str(ROOT), "-B", str(folder), "-DONEPASS_SANITIZE=ON"]
        for command in (configure, [*CMAKE, "--build", str(folder), "-j2"]):
            done = background.run(command)
            assert done.returncode == 0, done.stdout
        return folder / "libonepass_cpu.so"

    background.begin("sanitized library", build)


@pytest.fixture(scope="module")
def library(background: Background) -> Path:
    runtime("libasan.so")
    path: Path = background.result("sanitized library")
    return path


def run_sanitized(library: Path, isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers' runtime loaded first; the interpreter's own leaks are not our business."""
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "ONEPASS_CPU_LIBRARY": str(library),
        "ONEPASS_CPU_ISA": isa,
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu_library.isas())
def test_kernels(library, isa):
    done = run_sanitized(library, isa, str(Path(__file__).parent / "driver.py"))
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert not any(report in done.stderr for report in REPORTS), done.stderr[-8000:]
    assert "all kernels ran" in done.stdout


@pytest.mark.slow
def test_faults_are_caught(library):
    """The checks must be able to fail: a kernel is told of one row too many, or of an address inside a number."""
    code = (
        "import struct, torch\n"
        "from onepass.core import cpu_library\n"
        "outs, lses = torch.zeros(2, 1, 64, 1, 64), torch.zeros(2, 1, 1, 65 if {byte} else 64)\n"
        "out, lse = torch.zeros(1, 64, 1, 64), torch.zeros(1, 1, 64)\n"
        "sizes = (0, 1, 2, 1, {seqlen}, 1, 64)  # dtype, threads, parts, batch, seqlen, heads, head_dim\n"
        "pointers = (outs.data_ptr(), lses.data_ptr() + {byte}, out.data_ptr(), lse.data_ptr())\n"
        "cpu_library.kernel('merge_attention')(struct.pack('=11q', *sizes, *pointers))\n"
    )
    done = run_sanitized(library, cpu_library.isas()[0], "-c", code.format(seqlen=65, byte=0))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    done = run_sanitized(library, cpu_library.isas()[0], "-c", code.format(seqlen=64, byte=2))
    assert done.returncode != 0
    assert "runtime error: load of misaligned address" in done.stderr
    done = run_sanitized(library, cpu_library.isas()[0], "-c", code.format(seqlen=64, byte=0))
    assert done.returncode == 0, done.stderr
