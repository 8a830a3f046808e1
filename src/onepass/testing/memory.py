"""How much memory a call needs beyond what it was given."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_ATTEMPTS = 5
_NOISE = 1 << 20


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most memory held at once during `call()`, its outputs included, beyond what was held before.

    On the CPU this is the resident set as Linux counts it, so workspaces of C++ kernels show; it is exact to about 1
    MB. Pages that Linux takes back meanwhile would hide as many new ones: then it is measured again. Pages that the C
    library keeps free would hide as many, too: glibc gives them back first. Call it once on a small problem before, so
    that threads and libraries are there. Raises RuntimeError where Linux's counters are missing.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    largest = 0
    for _ in range(_ATTEMPTS):
        _give_free_pages_back()
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError as error:
            raise RuntimeError(f"peak memory cannot be measured here: {_CLEAR}: {error}") from error
        before = _status_bytes("VmRSS")
        result = call()
        peak, after = _status_bytes("VmHWM"), _status_bytes("VmRSS")
        del result
        largest = max(largest, peak - before)
        if after > before - _NOISE:
            break
    return largest


def _give_free_pages_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: peak memory cannot be measured here")
