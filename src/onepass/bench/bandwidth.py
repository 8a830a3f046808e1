"""The roof of memory-bound operations: bytes per second, measured on this machine by a kernel of the library."""

from __future__ import annotations

import ctypes
import struct

from onepass.core import cpu_library

ACCESSES = {"read": 0, "copy": 1, "stream": 2}


def memory_bandwidth(
    access: str, size: int, num_threads: int, block_size: int = 1 << 16, seconds: float = 0.2
) -> float:
    """GB/s of `num_threads` threads that read `size` bytes, or copy them; what is read and what is written both count.

    access: "read"; "copy", through the caches, where a line is read before it is overwritten (which does not count);
    "stream", a copy whose stores go past the caches. Threads take blocks of `block_size` bytes in turn; the best pass
    within `seconds` counts. Raises ValueError for any other access and for numbers that are not positive.
    """
    if access not in ACCESSES:
        raise ValueError(f"memory_bandwidth: access is {access!r}; expected one of {', '.join(ACCESSES)}")
    if min(size, block_size) < 64 or num_threads < 1 or seconds <= 0.0:
        raise ValueError(
            f"memory_bandwidth: size is {size}, block_size is {block_size}, num_threads is {num_threads} and seconds "
            f"is {seconds}; sizes must be at least 64, the others positive"
        )
    result = ctypes.c_double()
    cpu_library.kernel("bandwidth")(
        struct.pack("=4qdq", num_threads, ACCESSES[access], size, block_size, seconds, ctypes.addressof(result))
    )
    return result.value
