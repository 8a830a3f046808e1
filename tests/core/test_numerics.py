"""The error budget itself: what passes, what does not, and what the message tells. Peak memory."""

import ctypes
import math

import pytest
import torch

from onepass.testing import memory, numerics


def test_rounding_passes_and_more_does_not(generator: torch.Generator) -> None:
    exact = torch.randn(50, 40, dtype=torch.float64, generator=generator)
    rounded = exact.float()
    assert numerics.error_in_budgets(rounded, exact, rounded) < 1
    wrong = rounded.clone()
    wrong[7, 9] += 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    comparison = numerics.compare("out", wrong, exact, rounded)
    assert not comparison.ok
    assert comparison.worst_index == (7, 9)
    with pytest.raises(AssertionError, match=r"out: .* budgets[\s\S]*worst at \(7, 9\)[\s\S]*seed: 5"):
        numerics.assert_within_budget([comparison], seed=5)


def test_many_small_errors_fail_by_their_mean(generator: torch.Generator) -> None:
    """Each is within the budget of the largest error; together they are a bias."""
    exact = torch.randn(100, 100, dtype=torch.float64, generator=generator)
    exact[0, 0] = 50.0
    rounded = exact.float()
    biased = rounded + 3e-6
    comparison = numerics.compare("out", biased, exact, rounded)
    assert comparison.error[0] < comparison.budget[0]
    assert comparison.error[1] > comparison.budget[1]
    assert not comparison.ok


def test_nonfinite_values_must_agree() -> None:
    exact = torch.tensor([1.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert numerics.compare("x", exact.float(), exact, exact.float()).ok
    for other in (
        [1.0, -math.inf, -math.inf, math.nan],
        [math.nan, math.inf, -math.inf, math.nan],
        [1.0, 2.0, 3.0, 4.0],
    ):
        comparison = numerics.compare("x", torch.tensor(other), exact, exact.float())
        assert comparison.nonfinite
        assert comparison.units == math.inf


def test_cancelled_terms_allow_their_rounding() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    tiny = torch.full((4,), 1e-7)
    assert not numerics.compare("dq", tiny, zero, zero.float()).ok
    assert numerics.compare("dq", tiny, zero, zero.float(), terms=1.0).ok


def test_empty_tensors_and_wrong_shapes() -> None:
    empty = torch.zeros(0, 3)
    assert numerics.compare("x", empty, empty.double(), empty).ok
    with pytest.raises(AssertionError, match="shapes"):
        numerics.compare("x", torch.zeros(2), torch.zeros(3).double(), torch.zeros(3))


def test_memory_starts_as_nan() -> None:
    with numerics.nan_filled_memory():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_operation_lists_cases() -> None:
    assert {"attention"} <= {operation for operation, _ in numerics.cases()}


def test_peak_memory_is_measured_again_when_pages_are_taken() -> None:
    other = [torch.ones(60 << 20, dtype=torch.uint8)]

    def hold() -> None:
        other.clear()
        x = torch.ones(40 << 20, dtype=torch.uint8)
        del x

    assert 36 << 20 < memory.peak_bytes(hold) < 60 << 20


def test_peak_memory_counts_pages_that_the_c_library_kept() -> None:
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    torch.ones(31 << 20, dtype=torch.uint8)  # from here on glibc takes less than that from its heap
    parts = [c.malloc(20 << 20) for _ in range(5)]
    for part in parts:
        ctypes.memset(part, 1, 20 << 20)
    last = c.malloc(1 << 20)  # so that the heap's end stays where it is
    for part in parts:
        c.free(part)
    assert 36 << 20 < memory.peak_bytes(lambda: torch.ones(40 << 20, dtype=torch.uint8)) < 60 << 20
    c.free(last)


def test_peak_memory_sees_what_is_freed_again() -> None:
    def hold() -> None:
        x = torch.ones(40 << 20, dtype=torch.uint8)
        del x

    assert memory.peak_bytes(lambda: None) < 4 << 20
    assert 36 << 20 < memory.peak_bytes(hold) < 60 << 20
