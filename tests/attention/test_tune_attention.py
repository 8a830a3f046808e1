"""scripts/tune_attention.py calls the kernels with every option, in the interpreter, on few keys."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.core import env

pytestmark = pytest.mark.skipif(not env.triton_interpreted(), reason="on a GPU it is a benchmark")
_PATH = Path(__file__).parents[2] / "scripts" / "tune_attention.py"


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("tune_attention", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tune_attention", module)
    spec.loader.exec_module(module)
    for name, value in {"BATCH": 2, "SEQLEN": 16, "WIDTH": 64}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize("packed", [False, True])
def test_triton_kernels_are_called_with_the_candidates(tune: Any, packed: bool) -> None:
    for option in ("everything", "plain"):
        for kernel in tune.CANDIDATES:
            launch = tune.call(tune.Subject(kernel, option, packed, 64), torch.float16)
            chosen, other = (launch(candidate) for candidate in (None, (16, 16, 4, 1)))
            compared = [pair for pair in zip(chosen, other, strict=True) if pair[0].numel()]
            assert compared
            for one, two in compared:
                torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
