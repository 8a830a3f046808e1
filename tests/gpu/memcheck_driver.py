"""Runs a share of all cases, forward and backward, on the GPU; meant to run inside compute-sanitizer
(test_memcheck.py).

    python memcheck_driver.py SHARE SHARES
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from test_tma import CASES as LONG_CASES

from onepass.core import replay
from onepass.ops.attention.triton import problem
from onepass.testing import numerics


def run(cases: Sequence[Any]) -> int:
    """How many of the cases Triton's kernels can do; those have been done."""
    done = 0
    for number, case in enumerate(cases):
        inputs = case.inputs(torch.bfloat16, "cuda", torch.Generator().manual_seed(number))
        if "triton" in case.backends(inputs):
            case.call(inputs, "triton")
            done += 1
    torch.cuda.synchronize()
    return done


def main() -> None:
    share, shares = map(int, sys.argv[1:])
    done = run([case for _, case in numerics.cases()][share::shares])
    problem.TMA_SEQLEN = 1
    with replay.paused():
        done += run(LONG_CASES[share::shares])
    print(f"{done} cases ran")


main()
