"""Planted faults: what a wrong kernel would do must be noticed by the comparison with the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.core.registry import KernelTable
from onepass.ops.attention import kernels
from onepass.ops.attention.inputs import CASES, AttentionCase, DecodeCase, MergeCase
from onepass.ops.attention.inputs_varlen import VarlenCase
from onepass.testing import faults, numerics

_K, _V, _SCALE, _LEFT, _RIGHT = 1, 2, 8, 9, 10  # places among the launchers' arguments
_SUMMED = [
    case
    for case in CASES
    if isinstance(case, (AttentionCase, VarlenCase))
    and (case.bias is not None or case.sink)
    and getattr(case, "page_size", None) is None  # no gradients
    and getattr(case, "used", None) != (0, 0, 0)  # gradients of zeros
]
_PLAIN = AttentionCase("plain", seqlen_q=60, seqlen_k=75, causal=True, window_size=(50, -1))

Launcher = Callable[..., Any]


def arguments_changed(change: Callable[[list[Any]], None]) -> Callable[[Launcher], Launcher]:
    def broken(launcher: Launcher) -> Launcher:
        def run(*args: Any) -> Any:
            changed = list(args)
            change(changed)
            return launcher(*changed)

        return run

    return broken


def results_changed(change: Callable[[list[Tensor]], None]) -> Callable[[Launcher], Launcher]:
    def broken(launcher: Launcher) -> Launcher:
        def run(*args: Any) -> Any:
            results = [x.clone() for x in launcher(*args)]
            change(results)
            return tuple(results)

        return run

    return broken


def set_argument(place: int, change: Callable[[Any], Any]) -> Callable[[Launcher], Launcher]:
    def assign(args: list[Any]) -> None:
        args[place] = change(args[place])

    return arguments_changed(assign)


def drop_last_keys(args: list[Any]) -> None:
    """The last tile is forgotten; what is left keeps its places, so the mask hides the dropped keys."""
    mask = torch.ones(args[_K].shape[:2], dtype=torch.bool)
    mask[:, -3:] = False
    args[6] = mask


def scale_result(place: int, factor: float) -> Callable[[Launcher], Launcher]:
    def multiply(results: list[Tensor]) -> None:
        results[place] = results[place] * factor

    return results_changed(multiply)


def unwritten_row(results: list[Tensor]) -> None:
    results[0][1, 7] = torch.nan


def swap_heads(results: list[Tensor]) -> None:
    results[1] = results[1].flip(2)


FORWARD_FAULTS = {
    "mask off by one": set_argument(_RIGHT, lambda right: right + 1),
    "window off by one": set_argument(_LEFT, lambda left: left - 1),
    "missing scale": set_argument(_SCALE, lambda scale: 1.0),
    "scale a thousandth off": set_argument(_SCALE, lambda scale: scale * 1.001),
    "dropped last tile": arguments_changed(drop_last_keys),
    "lse in base 2": scale_result(1, 1.4427),
    "row not written": results_changed(unwritten_row),
    "v's heads swapped": set_argument(_V, lambda v: v.flip(2)),
}
BACKWARD_FAULTS = {
    "dq without scale": scale_result(0, 32**0.5),
    "dk of other heads": results_changed(swap_heads),
    "dv a thousandth off": scale_result(2, 1.001),
    "dlse forgotten": set_argument(1, lambda dlse: None),
    "mask off by one": set_argument(_RIGHT + 4, lambda right: right + 1),
}


def assert_noticed(table: KernelTable, backend: str, fault: Any, case: Any, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float32, "cpu", generator)
    numerics.assert_within_budget(numerics.compare_inputs(case, inputs, backend))
    with faults.replaced(table, backend, fault), pytest.raises(AssertionError, match="budgets") as failure:
        numerics.assert_within_budget(numerics.compare_inputs(case, inputs, backend), seed=1)
    assert "worst at" in str(failure.value)
    assert "seed: 1" in str(failure.value)


@pytest.mark.parametrize("fault", FORWARD_FAULTS.values(), ids=FORWARD_FAULTS)
def test_forward_fault_is_noticed(fused: str, fault: Any, generator: torch.Generator) -> None:
    assert_noticed(kernels.FORWARD, fused, fault, _PLAIN, generator)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS.values(), ids=BACKWARD_FAULTS)
def test_backward_fault_is_noticed(fused: str, fault: Any, generator: torch.Generator) -> None:
    assert_noticed(kernels.BACKWARD, fused, fault, _PLAIN, generator)


def test_decode_fault_is_noticed(fused: str, generator: torch.Generator) -> None:
    one_short = set_argument(3, lambda lengths: lengths - 1)
    assert_noticed(kernels.DECODE, fused, one_short, DecodeCase("decode"), generator)
    one_past = set_argument(3, lambda lengths: lengths + 1)  # reads an entry that holds NaN
    assert_noticed(kernels.DECODE, fused, one_past, DecodeCase("decode"), generator)


def test_merge_fault_is_noticed(fused: str, generator: torch.Generator) -> None:
    unweighted = set_argument(1, torch.zeros_like)
    assert_noticed(kernels.MERGE, fused, unweighted, MergeCase("merge", empty=False), generator)


def test_write_outside_is_noticed() -> None:
    for x in (torch.randn(4, 6), torch.randn(6, 4).T, torch.randn(1, 6).expand(4, 6), torch.ones(3, dtype=torch.bool)):
        guard = numerics.guarded(x)
        assert torch.equal(guard.tensor, x)
        assert guard.tensor.stride() == x.stride()
        assert guard.intact()
        guard.buffer[66] = 0
        assert not guard.intact()


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", _SUMMED, ids=lambda case: case.name)
def test_gradients_of_zeros_are_noticed(case: Any, precision: torch.dtype, generator: torch.Generator) -> None:
    """Where a gradient is a sum of many rows its budget is not as large as the gradient."""
    inputs = case.inputs(precision, "cpu", generator)
    exact, rounded = case.call(numerics.in_double(inputs), "reference"), case.call(inputs, "reference")
    terms = case.terms(inputs)
    names = {"dattn_bias", "dattn_sink"} & set(exact)
    assert names
    for name in names:
        zeros = torch.zeros_like(rounded[name])
        assert numerics.error_in_budgets(zeros, exact[name], rounded[name], terms.get(name, 0.0)) > 3
