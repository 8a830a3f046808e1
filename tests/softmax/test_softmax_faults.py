"""Planted faults: what a wrong kernel would do must be noticed by the comparison with the oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.ops.softmax import kernels
from onepass.ops.softmax.inputs import SoftmaxCase
from onepass.testing import conformance

_CASE = SoftmaxCase("fault", shape=(6, 300))


def _last_column_forgotten(forward: Any) -> Any:
    def run(x: Tensor) -> Tensor:
        return torch.cat([forward(x[:, :-1].contiguous()), torch.zeros_like(x[:, :1])], -1)

    return run


def _row_not_written(launcher: Any) -> Any:
    def run(*args: Tensor) -> Tensor:
        result = launcher(*args).clone()
        result[2] = torch.nan
        return result

    return run


FORWARD_FAULTS = {
    "last column forgotten": _last_column_forgotten,
    "a thousandth off": lambda forward: lambda x: forward(x) * 1.001,
    "powers of two": lambda forward: lambda x: forward(x * 0.6931),
    "row not written": _row_not_written,
}
BACKWARD_FAULTS = {
    "sum forgotten": lambda backward: lambda dy, y: dy * y,
    "last column not in the sum": lambda backward: lambda dy, y: backward(dy, y) + y * (dy * y)[:, -1:],
    "a thousandth off": lambda backward: lambda dy, y: backward(dy, y) * 1.001,
    "row not written": _row_not_written,
}
FAULTS = [
    *(pytest.param(kernels.FORWARD, fault, id=f"forward, {name}") for name, fault in FORWARD_FAULTS.items()),
    *(pytest.param(kernels.BACKWARD, fault, id=f"backward, {name}") for name, fault in BACKWARD_FAULTS.items()),
]


@pytest.mark.parametrize(("table", "fault"), FAULTS)
def test_fault_is_noticed(table: Any, fault: Any, fused: str, device: str, generator: torch.Generator) -> None:
    inputs = _CASE.inputs(torch.float32, device, generator)
    conformance.fault_is_noticed(_CASE, inputs, fused, table, fault)
