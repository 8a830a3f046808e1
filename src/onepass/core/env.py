"""Every environment variable that onepass reads, each once, when it is first asked for."""

from __future__ import annotations

import os


def cpu_isa() -> str | None:
    """ONEPASS_CPU_ISA: run the C++ kernels of this instruction set (`onepass info` lists them), not the best one."""
    return os.environ.get("ONEPASS_CPU_ISA") or None


def cpu_library() -> str | None:
    """ONEPASS_CPU_LIBRARY: path of a libonepass_cpu.so to load instead of the installed one (for builds under test)."""
    return os.environ.get("ONEPASS_CPU_LIBRARY") or None


def triton_interpreted() -> bool:
    """TRITON_INTERPRET=1: Triton's own switch, which runs kernels on CPU tensors; set before they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
