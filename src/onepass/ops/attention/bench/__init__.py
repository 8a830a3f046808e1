"""Benchmarks of attention: on the CPU plain (cpu.py) and with options (options.py), on GPUs (gpu.py, decode.py,
first_call.py).

problem.py says what one size with its options is, contenders.py who computes it.
"""

from onepass.bench.registry import Benchmark
from onepass.ops.attention.bench import cpu, decode, first_call, gpu, options

BENCHMARK = Benchmark(
    "attention", (*cpu.GROUPS, *options.GROUPS, *gpu.GROUPS, *decode.GROUPS, gpu.HOST, first_call.GROUP)
)
