"""scripts/tune_attention.py calls the kernels with every option, in the interpreter, on few keys."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.core.triton_backend import Launcher

pytestmark = pytest.mark.interpreted  # on a GPU it is a benchmark
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
def test_triton_kernels_are_called_with_the_candidates(
    tune: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[tuple[int | None, int | None]] = []
    launch_kernel = Launcher.launch

    def watched(self: Launcher, grid: Any, device: Any, arguments: Any, constants: Any, **options: Any) -> None:
        tiles.append((constants.get("BLOCK_M"), constants.get("BLOCK_N")))
        launch_kernel(self, grid, device, arguments, constants, **options)

    monkeypatch.setattr(Launcher, "launch", watched)
    for option in ("everything", "plain"):
        for kernel in tune.CANDIDATES:
            if kernel == "bias" and option == "plain":
                continue
            launch = tune.call(tune.Subject(kernel, option, packed, 64), torch.float16, tune.SEQLEN)
            tiles.clear()
            results = [launch(candidate) for candidate in ((16, 32, 4, 1), (32, 16, 4, 1))]
            assert [tile for tile in tiles if None not in tile] == [(16, 32), (32, 16)]
            compared = [pair for pair in zip(*results, strict=True) if pair[0].numel()]
            assert compared
            for one, two in compared:
                torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
