"""Tests of attention run on every backend of the tables that this machine has; a new backend joins by itself."""

import pytest
import torch

from onepass.ops.attention import kernels

BACKENDS = kernels.FORWARD.usable
FUSED = [backend for backend in BACKENDS if backend != "reference"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)
    if "fused" in metafunc.fixturenames:
        metafunc.parametrize("fused", FUSED)
    if "dtype" in metafunc.fixturenames:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        metafunc.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])
