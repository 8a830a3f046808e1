"""The backends and dtypes that an operation's tests run with, for `pytest_generate_tests` of their conftest.py."""

from typing import Any

import torch

from onepass.core import env
from onepass.core.registry import KernelTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends_and_dtypes(metafunc: Any, table: KernelTable) -> None:
    """Fills the fixtures `backend` (each that this machine has), `fused` (but for the reference) and `dtype`.

    A new backend joins by itself. Triton's interpreter computes bf16 wrongly, so that is left out there.
    """
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", table.usable)
    if "fused" in metafunc.fixturenames:
        metafunc.parametrize("fused", [backend for backend in table.usable if backend != "reference"])
    if "dtype" in metafunc.fixturenames:
        dtypes = [dtype for dtype in DTYPES if not (env.triton_interpreted() and dtype is torch.bfloat16)]
        metafunc.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])
