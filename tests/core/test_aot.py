"""Compilation ahead of time: what it must notice, with kernels that are no kernels."""

import os
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

import pytest

from onepass.testing import aot


class Kernel:
    def __init__(self, name: str, gluon: bool = False) -> None:
        self.fn, self.__name__, self.gluon = SimpleNamespace(__module__="package"), name, gluon

    def is_gluon(self) -> bool:
        return self.gluon


def _launch(kernel: Any, targets: str = "") -> aot.Launch:
    return aot.Launch(kernel, (), {}, {}, {}, targets)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[aot.Launch]]:
    """The launches that each target makes; all kernels compile."""
    launches: dict[str, list[aot.Launch]] = {target: [] for target in aot.TARGETS}
    kernels = {"everywhere": "", "nvidia": "cuda", "one_chip": "cuda"}
    launchers = [SimpleNamespace(kernel=Kernel(name, name == "one_chip"), targets=of) for name, of in kernels.items()]
    for target, (backend, _, _) in aot.TARGETS.items():
        for launcher in launchers:
            if launcher.targets in ("", backend) and (not launcher.kernel.gluon or target == "sm_90"):
                launches[target].append(_launch(launcher.kernel, launcher.targets))
    monkeypatch.setattr(aot, "_launchers", lambda package: launchers)
    monkeypatch.setattr(aot, "recorded", lambda call, target: launches[target])
    monkeypatch.setattr(aot, "_failure", _compiles)
    return launches


def _compiles(place: int) -> str:
    return ""


def _is_wrong(place: int) -> str:
    return f"wrong {place}" if place == 1 else ""


def _crashes(place: int) -> str:
    os._exit(3)


def _compile() -> None:
    aot.assert_every_kernel_compiles("package", lambda: None)


def test_every_kernel_is_reached_on_every_target(package: dict[str, list[aot.Launch]]) -> None:
    _compile()
    assert len(aot._work) == 2 * 4 + 2 + 1
    del package["gfx942"][0]
    with pytest.raises(AssertionError, match=r"^gfx942: not launched: \[\('package', 'everywhere'\)\]"):
        _compile()


def test_what_is_for_one_chip_is_reached_on_that(package: dict[str, list[aot.Launch]]) -> None:
    package["sm_90"].pop()
    with pytest.raises(AssertionError, match=r"^not launched: \[\('package', 'one_chip'\)\]"):
        _compile()


def test_failures_are_told(package: dict[str, list[aot.Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_failure", _is_wrong)
    with pytest.raises(AssertionError, match="wrong 1"):
        _compile()


def test_a_process_that_crashes_ends_it(package: dict[str, list[aot.Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_failure", _crashes)
    with pytest.raises(BrokenProcessPool):
        _compile()
