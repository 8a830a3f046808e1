"""The cases, backends and dtypes that an operation's tests run with, for `pytest_generate_tests`.

A test of a GPU's backend is marked `gpu`, and skipped with the reason where that backend cannot run. Triton's kernels
need no GPU in its interpreter (TRITON_INTERPRET=1), and are then not marked.
"""

from typing import Any

import pytest
import torch

from onepass.core import env
from onepass.core.registry import Kernel, KernelTable
from onepass.testing import conformance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = ("backend", "other", "fused")


def of_operation(metafunc: Any, table: KernelTable) -> None:
    """Fills the fixtures `backend` and `other` (each of the table), `fused` (but for the reference), `dtype`, and
    `case` of tests from conformance.py: the test file's CASES.

    A new backend joins by itself. A test without the fixture `device` makes its tensors on the CPU, and has the
    backends that work there. Triton's interpreter computes bf16 wrongly, so that is left out there.
    """
    for name in _BACKENDS:
        if name not in metafunc.fixturenames:
            continue
        kernels = [kernel for kernel in table.kernels if kernel.backend != "reference" or name != "fused"]
        if "device" not in metafunc.fixturenames:
            kernels = [kernel for kernel in kernels if not on_gpu(kernel.backend) and kernel.unavailable() is None]
        metafunc.parametrize(name, [_parameter(kernel) for kernel in kernels])
    if "case" in metafunc.fixturenames and metafunc.function.__module__ == conformance.__name__:
        metafunc.parametrize("case", metafunc.module.CASES, ids=lambda case: case.name)
    if "dtype" in metafunc.fixturenames:
        dtypes = [dtype for dtype in DTYPES if not (env.triton_interpreted() and dtype is torch.bfloat16)]
        metafunc.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])


def on_gpu(backend: str) -> bool:
    """Whether the backend's tests take tensors on the GPU."""
    return backend not in ("cpu", "reference") and not env.triton_interpreted()


def _parameter(kernel: Kernel) -> Any:
    missing = kernel.unavailable()
    marks = [pytest.mark.gpu] if on_gpu(kernel.backend) else []
    if missing is not None:
        marks.append(pytest.mark.skip(reason=f"{kernel.backend}: {missing}"))
    return pytest.param(kernel.backend, marks=marks)
