"""Planted faults: what a wrong kernel would do must be noticed by the comparison with the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.core.registry import KernelTable
from onepass.ops.cross_entropy import kernels
from onepass.ops.cross_entropy.inputs import CrossEntropyCase, LinearCase, Options
from onepass.testing import conformance

_OPTIONS = Options(label_smoothing=0.1, z_loss=1e-2, softcap=5.0, return_lse=True)
_CASE = CrossEntropyCase("fault", shape=(12, 300), options=_OPTIONS)
_LINEAR = LinearCase("fault, linear", shape=(60, 24), classes=150, low_memory=True, bias=True)

Launcher = Callable[..., Any]


def argument(place: int, change: Callable[[Any], Any]) -> Callable[[Launcher], Launcher]:
    """The launcher with one argument changed."""

    def broken(launcher: Launcher) -> Launcher:
        return lambda *args: launcher(*args[:place], change(args[place]), *args[place + 1 :])

    return broken


def result(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[Launcher], Launcher]:
    """The launcher with one result changed."""

    def broken(launcher: Launcher) -> Launcher:
        def run(*args: Any) -> tuple[Tensor, ...]:
            results = list(launcher(*args))
            results[place] = change(results[place])
            return tuple(results)

        return run

    return broken


def gradient(change: Callable[..., Tensor]) -> Callable[[Launcher], Launcher]:
    """The backward with its result changed, in place where it was made in place."""

    def broken(launcher: Launcher) -> Launcher:
        def run(*args: Any) -> Tensor:
            made: Tensor = launcher(*args)
            return made.copy_(change(made.clone(), *args))

        return run

    return broken


def _last_class_forgotten(x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([x.shape[1] - 1], device=x.device), -100.0)


def _row_not_written(x: Tensor, *args: Any) -> Tensor:
    x[7] = torch.nan
    return x


FORWARD_FAULTS = {
    "last class forgotten": argument(0, _last_class_forgotten),
    "target off by one": argument(1, lambda target: torch.where(target < 0, target, (target + 1) % 300)),
    "ignored rows counted": argument(2, lambda ignore_index: -7),
    "no label smoothing": argument(3, lambda smoothing: 0.0),
    "no z-loss": argument(4, lambda z_loss: 0.0),
    "no softcap": argument(5, lambda softcap: 0.0),
    "lse in base 2": result(1, lambda lse: lse * 1.4427),
    "row not written": result(0, _row_not_written),
}
BACKWARD_FAULTS = {
    "dlse forgotten": argument(1, lambda dlse: None),
    "target off by one": argument(3, lambda target: torch.where(target < 0, target, (target + 1) % 300)),
    "no label smoothing": argument(6, lambda smoothing: 0.0),
    "no z-loss": argument(7, lambda z_loss: 0.0),
    "softcap's slope forgotten": argument(8, lambda softcap: 0.0),
    "a thousandth off": gradient(lambda made, *args: made * 1.001),
    "row not written": gradient(_row_not_written),
}
REDUCE_FAULTS = {
    "ignored rows counted": argument(2, lambda ignore_index: -7),
    "a sum": argument(3, lambda mean: False),
    "scale a thousandth off": result(1, lambda scale: scale * 1.001),
}
FAULTS = [
    pytest.param(table, fault, id=f"{direction}, {name}")
    for direction, table, found in (
        ("forward", kernels.FORWARD, FORWARD_FAULTS),
        ("backward", kernels.BACKWARD, BACKWARD_FAULTS),
        ("reduction", kernels.REDUCE, REDUCE_FAULTS),
    )
    for name, fault in found.items()
]
LINEAR_FAULTS = {
    "classes counted from the strip": gradient(lambda made, *args: made.roll(1, 1)),
    "a hundredth off": gradient(lambda made, *args: made * 1.01),
}


_NOTICE = (AssertionError, RuntimeError, IndexError), "budgets|size|ignore_index"


@pytest.mark.parametrize(("table", "fault"), FAULTS)
def test_fault_is_noticed(table: KernelTable, fault: Any, fused: str, device: str, generator: torch.Generator) -> None:
    inputs = _CASE.inputs(torch.float32, device, generator)
    inputs["target"][1] = -100
    conformance.fault_is_noticed(_CASE, inputs, fused, table, fault, _NOTICE)


@pytest.mark.parametrize("fault", LINEAR_FAULTS.values(), ids=LINEAR_FAULTS)
def test_linear_fault_is_noticed(fault: Any, fused: str, device: str, generator: torch.Generator) -> None:
    inputs = _LINEAR.inputs(torch.float32, device, generator)
    conformance.fault_is_noticed(_LINEAR, inputs, fused, kernels.BACKWARD, fault, _NOTICE)
