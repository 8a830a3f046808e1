"""The roof of memory-bound operations: bytes per second, measured on this machine by kernels of the library that only
read, or only copy.

`roofline` is what every percentage of bandwidth divides by; `measure` shows how it depends on the size of the memory,
on how many blocks work at once (threads on the CPU, programs on a GPU) and on the size of a block.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onepass.bench import environment, timing
from onepass.core import cpu_library

ACCESSES = {"read": 0, "copy": 1, "stream": 2}
KIND = {"read": "read", "copy": "copy", "stream": "copy"}  # of the roofline that an access measures
ROOF_SIZE = {"cpu": 64 << 20, "cuda": 1 << 30}
CPU_BLOCK = 1 << 16


def memory_bandwidth(
    access: str, size: int, num_threads: int, block_size: int = CPU_BLOCK, seconds: float = 0.2
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


ONE_EACH = 0  # a program for each block: small ones copy fastest on an H200


class GpuMemory:
    """Two buffers of one size on the current GPU, and how fast our kernels read the one or copy it to the other."""

    def __init__(self, size: int, seconds: float = 2e-3) -> None:
        self.source = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device="cuda")
        self.target = torch.empty_like(self.source)
        self.clock = timing.DeviceClock(seconds)

    def bandwidth(self, access: str, blocks: int, block_size: int) -> float:
        """GB/s of `blocks` programs (ONE_EACH: as many as there are blocks) that take blocks of `block_size` bytes, a
        power of two, in turn.
        """
        from onepass.bench import bandwidth_triton

        elements = block_size // 4
        blocks = blocks or self.source.numel() // elements
        call: Callable[[], object]
        if access == "read":
            results = torch.empty(blocks, dtype=torch.int32, device="cuda")
            call = lambda: bandwidth_triton.read(self.source, results, blocks, elements)  # noqa: E731
        elif access == "copy":
            call = lambda: bandwidth_triton.copy(self.source, self.target, blocks, elements)  # noqa: E731
        else:
            raise ValueError(f"on a GPU access is 'read' or 'copy', got {access!r}")
        moved = self.source.numel() // elements * block_size * (1 if access == "read" else 2)
        return 1e-9 * moved / self.clock.sample(call, None, self.clock.calls(call, None))


@dataclass(frozen=True)
class Sweep:
    """What to measure: every combination. Sizes are in bytes; a copy has two buffers of `size`.

    blocks: threads on the CPU; on a GPU programs, or ONE_EACH.
    """

    device: str
    accesses: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    block_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        lists = (self.sizes, self.blocks, self.block_sizes)
        least = ONE_EACH if self.device == "cuda" else 1
        if (
            not all(lists)
            or min(*self.sizes, *self.block_sizes) < 1
            or min(self.blocks) < least
            or min(self.sizes) < max(self.block_sizes)
        ):
            raise ValueError(
                f"sizes {self.sizes}, blocks {self.blocks} and block sizes {self.block_sizes} must be positive, and "
                f"every size at least the largest block size"
            )
        if self.device == "cuda" and any(size < 1024 or size & (size - 1) for size in self.block_sizes):
            raise ValueError(f"on a GPU block sizes must be powers of two of at least 1024, got {self.block_sizes}")


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def default_sweep(device: str, num_threads: int) -> Sweep:
    """A wide one: from what caches hold to what they do not."""
    if device == "cuda":
        return Sweep(
            device,
            ("read", "copy"),
            sizes=tuple(1 << n for n in (24, 26, 28, 30, 32)),
            blocks=(ONE_EACH, *(multiprocessors() * n for n in (1, 2, 4, 8, 16, 32))),
            block_sizes=tuple(1 << n for n in (12, 13, 14, 15, 16)),
        )
    threads = sorted({1, num_threads, *(1 << n for n in range(8) if 1 << n < num_threads)})
    return Sweep(
        device,
        tuple(ACCESSES),
        sizes=tuple(1 << n for n in (16, 18, 20, 22, 24, 26, 28)),
        blocks=tuple(threads),
        block_sizes=tuple(1 << n for n in (12, 14, 16)),
    )


def roof_sweep(device: str, num_threads: int) -> Sweep:
    """What `roofline` takes the best of."""
    if device == "cuda":
        blocks = (ONE_EACH, multiprocessors() * 16)
        return Sweep(device, ("read", "copy"), (ROOF_SIZE[device],), blocks, (1 << 12, 1 << 13, 1 << 14))
    return Sweep(device, tuple(ACCESSES), (ROOF_SIZE[device],), (num_threads,), (CPU_BLOCK,))


def points(
    sweep: Sweep, seconds: float = 0.02, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """GB/s at every point of the sweep."""
    found = []
    for size in sweep.sizes:
        memory = GpuMemory(size) if sweep.device == "cuda" else None
        for access, blocks, block_size in itertools.product(sweep.accesses, sweep.blocks, sweep.block_sizes):
            progress(f"{access}, {size} bytes, {blocks} blocks of {block_size}")
            if memory is not None:
                gbps = memory.bandwidth(access, blocks, block_size)
            else:
                gbps = memory_bandwidth(access, size, blocks, block_size, seconds)
            point = {"access": access, "size": size, "blocks": blocks, "block_size": block_size, "gbps": gbps}
            found.append(point)
    return found


def best(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best GB/s of reading and of copying, by whatever stores."""
    kinds = dict.fromkeys(KIND[point["access"]] for point in found)
    return {kind: max(p["gbps"] for p in found if KIND[p["access"]] == kind) for kind in kinds}


def roofline(device: str, num_threads: int = 1, seconds: float = 0.1) -> dict[str, float]:
    """GB/s of this device's memory now: {"read": ..., "copy": ...}, a copy's reads and writes both counted.

    On the CPU with `num_threads` threads on 64 MiB, with plain stores or with such that go past the caches, whichever
    is faster; on a GPU on 1 GiB, the best of a few launch sizes.
    """
    return best(points(roof_sweep(device, num_threads), seconds))


def measure(sweep: Sweep, num_threads: int, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """A sweep as a result that is ready for JSON."""
    found = points(sweep, progress=progress)
    return {
        "benchmark": "bandwidth",
        "sweep": asdict(sweep),
        "environment": environment.facts(num_threads, sweep.device),
        "best": best(found),
        "points": found,
    }
