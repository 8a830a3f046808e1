"""Tests run on every backend of the tables that this machine has; Triton's on the GPU, or interpreted on the CPU."""

import pytest
import torch

from onepass.ops.softmax import kernels

BACKENDS = kernels.FORWARD.usable
FUSED = [backend for backend in BACKENDS if backend != "reference"]


def _marked(backend: str) -> object:
    on_gpu = backend == "triton" and torch.cuda.is_available()
    return pytest.param(backend, marks=pytest.mark.gpu) if on_gpu else backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [_marked(backend) for backend in BACKENDS])
    if "fused" in metafunc.fixturenames:
        metafunc.parametrize("fused", [_marked(backend) for backend in FUSED])
    if "dtype" in metafunc.fixturenames:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        metafunc.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where this test's backend works."""
    names = [request.getfixturevalue(name) for name in ("backend", "fused") if name in request.fixturenames]
    return "cuda" if "triton" in names and torch.cuda.is_available() else "cpu"
