"""Times configurations of the attention kernels on this GPU; src/onepass/ops/attention/triton/config.py has the best.

    python scripts/tune_attention.py                                            every option, head_dim 64, 128, 256
    python scripts/tune_attention.py --options dropout,bias --head-dims 128 --out tune.json

One line for each kernel, option and head_dim: the time of what config.py chooses, and the best of the candidates; the
JSON has all of them, and the bytes of registers that a thread of each spills. Processes compile the kernels side by
side first, into Triton's cache. Times are medians of rounds in which candidates take turns, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from onepass.ops.attention.triton import bwd, bwd_bias, config, fwd, varlen
from onepass.ops.attention.triton.config import BackwardConfig, ForwardConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in Triton's interpreter
BATCH, SEQLEN, WIDTH = 4, 4096, 2048  # WIDTH: heads * head_dim
COMPILED_SEQLEN = 1024  # the same kernels as SEQLEN's, with less memory
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"right": 0, "left": 1024},
    "softcap": {"right": 0, "softcap": 20.0},
    "alibi": {"right": 0, "alibi": True},
    "sink": {"right": 0, "sink": True},
    "key_mask": {"mask": True},
    "bias": {"bias": True},
    "dropout": {"right": 0, "p": 0.1},
    "bias+dropout": {"bias": True, "p": 0.1},
    "everything": {
        "right": 0, "left": 1024, "softcap": 20.0, "alibi": True, "sink": True, "mask": True, "bias": True, "p": 0.1,
    },
}  # fmt: skip
# (block_m, block_n, num_warps, num_stages), and the fields after those where they are not the defaults, beside those of
# config.py; by head_dim.
CANDIDATES: dict[str, dict[int, list[tuple[int, ...]]]] = {
    "forward": {
        64: [(64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3)],
        128: [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 128, 8, 2)],
        256: [(128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    },
    "keys": {
        64: [(32, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 3)],
        128: [
            (32, 64, 4, 2),
            (32, 64, 4, 3),
            (64, 64, 4, 2),
            (64, 64, 4, 2, True, True, True),
            (64, 64, 8, 2),
            (32, 128, 8, 2),
        ],
        256: [(32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (64, 32, 8, 2)],
    },
    "queries": {
        64: [(64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (64, 64, 8, 2)],
        128: [(64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2)],
        256: [(64, 32, 8, 2), (64, 32, 4, 2), (128, 16, 8, 2), (64, 16, 4, 2)],
    },
    "bias": {
        64: [(64, 64, 8, 1), (64, 128, 8, 1), (128, 64, 8, 1), (64, 32, 4, 1)],
        128: [(64, 64, 8, 1), (64, 64, 4, 1), (32, 64, 8, 1), (64, 32, 4, 1)],
        256: [(64, 32, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1), (64, 32, 4, 1)],
    },
}
_CHOICES = {
    "forward": ((fwd, varlen), "forward_config"),
    "keys": ((bwd,), "backward_keys_config"),
    "queries": ((bwd,), "backward_queries_config"),
    "bias": ((bwd,), "backward_bias_config"),
}


@dataclass(frozen=True)
class Subject:
    """A kernel with an option."""

    kernel: str
    option: str
    packed: bool
    head_dim: int

    def candidates(self) -> list[tuple[int, ...] | None]:
        """None: what config.py chooses."""
        return [None, *CANDIDATES[self.kernel][self.head_dim]]


def call(subject: Subject, dtype: torch.dtype, seqlen: int) -> Callable[[tuple[int, ...] | None], Any]:
    """A function that launches the subject with a configuration, on inputs of its own."""
    features, heads = OPTIONS[subject.option], WIDTH // subject.head_dim
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(of)

    rows = (BATCH * seqlen,) if subject.packed else (BATCH, seqlen)
    q, k, v, do = (normal(*rows, heads, subject.head_dim) for _ in range(4))
    # A bias that is not shared has its gradient from dq's kernel.
    batch = BATCH if subject.packed and subject.kernel != "bias" else 1
    tensors = (
        normal(batch, heads, seqlen, seqlen) if "bias" in features else None,
        normal(heads, of=torch.float32).abs() if "alibi" in features else None,
        normal(heads) if "sink" in features else None,
        torch.rand(rows, generator=generator, device=DEVICE) < 0.9 if "mask" in features else None,
        torch.tensor([7, 0], device=DEVICE) if "p" in features else None,
    )
    left, right, softcap, p = (features.get(name, missing) for name, missing in _MISSING.items())
    numbers = (subject.head_dim**-0.5, left, right, True, softcap, p, False)
    lengths = torch.arange(BATCH + 1, device=DEVICE, dtype=torch.int32) * seqlen
    module: Any = varlen if subject.packed else fwd
    # Lengths, pages and the longest sequences.
    sequences, pages, longest = (
        ((lengths, lengths, None), (None,), (seqlen, seqlen)) if subject.packed else ((), (), ())
    )

    def forward() -> Any:
        return module.forward(q, k, v, *sequences, *pages, *tensors, *longest, *numbers)

    if subject.kernel == "forward":
        run = forward
    else:
        out, lse = forward()
        needs = (*(subject.kernel == kernel for kernel in ("queries", "keys", "bias")), False)
        backward: Any = varlen.backward if subject.packed else bwd.backward

        def run() -> Any:
            return backward(do, None, q, k, v, out, lse, *sequences, *tensors, *longest, *numbers, *needs)

    modules, name = _CHOICES[subject.kernel]
    chosen = getattr(config, name)
    make: Any = ForwardConfig if subject.kernel == "forward" else BackwardConfig

    def with_config(candidate: tuple[int, ...] | None) -> Any:
        choose = chosen if candidate is None else lambda problem: make(*candidate)
        for each in modules:
            setattr(each, name, choose)
        try:
            return run()
        finally:
            for each in modules:
                setattr(each, name, chosen)

    return with_config


def _compiled(subject: Subject) -> dict[Any, Any]:
    """Triton's table of the compiled kernels of this process."""
    kernel: Any = _KERNELS[subject.kernel]
    return kernel.device_caches[torch.cuda.current_device()][0]  # type: ignore[no-any-return]


_KERNELS = {
    "forward": fwd._fwd_kernel,
    "keys": bwd._keys_bwd_kernel,
    "queries": bwd._queries_bwd_kernel,
    "bias": bwd_bias._bias_bwd_kernel,
}
_MISSING = {"left": -1, "right": -1, "softcap": 0.0, "p": 0.0}


def compile_share(index: int, count: int, subjects: list[Subject], dtype: torch.dtype) -> None:
    """Every count-th kernel from `index` on; what does not compile is told by `measure`."""
    jobs = [(subject, candidate) for subject in subjects for candidate in subject.candidates()]
    for subject, candidate in jobs[index::count]:
        try:
            call(subject, dtype, COMPILED_SEQLEN)(candidate)
        except Exception:
            continue
        finally:
            torch.cuda.empty_cache()


def measure(subject: Subject, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    run = call(subject, dtype, SEQLEN)
    times: dict[Any, list[float]] = {}
    failed, spilled = {}, {}
    for candidate in subject.candidates():
        known = set(_compiled(subject))
        try:
            run(candidate)
            times[candidate] = []
            new = [kernel.n_spills for key, kernel in _compiled(subject).items() if key not in known]
            spilled[str(candidate)] = 4 * max(new) if new else None  # None: compiled for another subject
        except Exception as error:
            failed[str(candidate)] = f"{type(error).__name__}: {error}"[:200]
    for _ in range(rounds):
        for candidate, seen in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(400_000)  # the launch is queued before the clock starts
            start.record()
            run(candidate)
            end.record()
            end.synchronize()
            seen.append(1000 * start.elapsed_time(end))
    medians = {candidate: statistics.median(seen) for candidate, seen in times.items()}
    best = min(medians, key=lambda candidate: medians[candidate], default=None)
    return {
        **asdict(subject),
        "chosen_us": medians.get(None),
        "best": best,
        "best_us": medians.get(best),
        "us": {str(candidate): us for candidate, us in medians.items()},
        "spilled": spilled,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", default=",".join(OPTIONS), help="of: " + ", ".join(OPTIONS))
    parser.add_argument("--kernels", default=",".join(CANDIDATES))
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--layouts", default="dense,packed")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if DEVICE == "cpu":
        parser.error("there is no GPU here to time on")
    dtype = getattr(torch, arguments.dtype)
    subjects = [
        Subject(kernel, option, layout == "packed", int(head_dim))
        for head_dim in arguments.head_dims.split(",")
        for option in arguments.options.split(",")
        for layout in arguments.layouts.split(",")
        for kernel in arguments.kernels.split(",")
        if kernel != "bias" or "bias" in OPTIONS[option]
    ]
    count = min(14, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_share, args=(i, count, subjects, dtype)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results = []
    for subject in subjects:
        result = measure(subject, dtype, arguments.rounds)
        results.append(result)
        name = f"{subject.head_dim} {'packed ' if subject.packed else ''}{subject.option} {subject.kernel}"
        gain = result["chosen_us"] / result["best_us"] if result["chosen_us"] else math.nan
        print(f"{name:40} {result['chosen_us'] or 0:9.1f}  {gain:5.2f}x  {result['best'] or ''}", flush=True)
        torch.cuda.empty_cache()
        if arguments.out:
            about = {"gpu": torch.cuda.get_device_name(), "dtype": arguments.dtype, "torch": torch.__version__}
            part = arguments.out.with_name(arguments.out.name + ".part")
            part.write_text(json.dumps({"about": about, "results": results}, indent=1))
            part.replace(arguments.out)


if __name__ == "__main__":
    main()
