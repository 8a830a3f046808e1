"""The roof that benchmarks divide by: multiply-adds per second, measured on this machine by a kernel of the library
that touches no memory.
"""

from __future__ import annotations

import ctypes
import struct

import torch

from onepass.core import cpu_library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 0}  # fp16 is computed in fp32


def fma_peak(dtype: torch.dtype, num_threads: int, seconds: float = 0.05) -> float:
    """GFLOP/s of multiply-adds on `num_threads` threads with the ISA in use.

    fp32 (and fp16, which kernels convert): vector multiply-adds. bf16: the bf16 dot where the ISA has it, else as fp32.
    Raises ValueError for other dtypes and for a thread count or a time that is not positive.
    """
    if dtype not in DTYPE_CODES:
        raise ValueError(f"fma_peak: dtype is {dtype}; expected one of {', '.join(map(str, DTYPE_CODES))}")
    if num_threads < 1 or seconds <= 0.0:
        raise ValueError(f"fma_peak: num_threads is {num_threads} and seconds is {seconds}; both must be positive")
    gflops = ctypes.c_double()
    cpu_library.kernel("fma_peak")(
        struct.pack("=qqdq", DTYPE_CODES[dtype], num_threads, seconds, ctypes.addressof(gflops))
    )
    return gflops.value
