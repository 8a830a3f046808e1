"""rms_norm and layer_norm: against PyTorch's functions, edges, bad input, planted faults."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass.ops.norm import kernels
from onepass.ops.norm.inputs import NormCase
from onepass.testing import conformance


def assert_gradients_close(ours: Any, theirs: Any, inputs: list[Tensor], generator: torch.Generator) -> None:
    douts = [torch.randn(x.shape, generator=generator).to(x) for x in ours]
    for a, b in zip(torch.autograd.grad(ours, inputs, douts), torch.autograd.grad(theirs, inputs, douts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 7, 96, 5000])
def test_rms_norm_is_pytorchs(backend: str, device: str, columns: int, generator: torch.Generator) -> None:
    x = torch.randn(3, 5, columns, generator=generator).to(device).requires_grad_()
    weight = torch.randn(columns, generator=generator).to(device).requires_grad_()
    ours = onepass.rms_norm(x, weight, eps=1e-3, backend=backend)
    twin = F.rms_norm(x, (columns,), weight, 1e-3)
    torch.testing.assert_close(ours, twin)
    assert_gradients_close([ours], [twin], [x, weight], generator)


@pytest.mark.parametrize("columns", [1, 7, 96, 5000])
def test_layer_norm_is_pytorchs(backend: str, device: str, columns: int, generator: torch.Generator) -> None:
    x = (torch.randn(3, 5, columns, generator=generator).to(device) + 2).requires_grad_()
    weight, bias = (torch.randn(columns, generator=generator).to(device).requires_grad_() for _ in range(2))
    ours = onepass.layer_norm(x, weight, bias, eps=1e-3, backend=backend)
    twin = F.layer_norm(x, (columns,), weight, bias, 1e-3)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)
    assert_gradients_close([ours], [twin], [x, weight, bias], generator)


def test_residual_is_an_addition_before(
    backend: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """residual_out is the rounded sum, the norm is of that, and both outputs' gradients reach both inputs."""
    x, residual = (torch.randn(4, 5, 64, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(64, generator=generator).to(device, dtype)
    for norm in (onepass.rms_norm, onepass.layer_norm):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        y, total = norm(leaves[0], leaves[2], residual=leaves[1], backend=backend)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, norm(x + residual, weight, backend=backend))
        sums = (leaves[0] + leaves[1], leaves[2])
        expected = norm(*sums, backend=backend)
        douts = [torch.randn(y.shape, generator=generator).to(device, dtype) for _ in range(2)]
        ours = torch.autograd.grad((y, total), leaves, douts, retain_graph=True)
        theirs = torch.autograd.grad((expected, sums[0]), leaves, douts)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2)
        assert torch.equal(ours[0], ours[1])
        (alone,) = torch.autograd.grad(total, leaves[:1], douts[1])  # nothing comes through y
        assert torch.equal(alone, douts[1])


def test_gemmas_offset(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight = torch.randn(4, 32, generator=generator).to(device), torch.randn(32, generator=generator).to(device)
    torch.testing.assert_close(
        onepass.rms_norm(x, weight, offset=1.0, backend=backend), onepass.rms_norm(x, weight + 1, backend=backend)
    )


def test_only_what_is_needed(backend: str, device: str, generator: torch.Generator) -> None:
    x, weight, bias, dy = (
        torch.randn(shape, generator=generator).to(device) for shape in ((4, 32), (32,), (32,), (4, 32))
    )
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    all_three = torch.autograd.grad(onepass.layer_norm(*leaves, backend=backend), leaves, dy)
    for i, expected in enumerate(all_three):
        given = [leaf if j == i else leaf.detach() for j, leaf in enumerate(leaves)]
        (alone,) = torch.autograd.grad(onepass.layer_norm(*given, backend=backend), leaves[i], dy)
        assert torch.equal(alone, expected)


def test_row_alone_is_the_row_in_a_batch(
    fused: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, residual = (torch.randn(37, 200, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(200, generator=generator).to(device, dtype)
    for norm in (onepass.rms_norm, onepass.layer_norm):
        whole = norm(x, weight, residual=residual, backend=fused)
        for i in (0, 17, 36):
            for a, b in zip(norm(x[i], weight, residual=residual[i], backend=fused), whole, strict=True):
                assert torch.equal(a, b[i])


def test_rows_do_not_meet(fused: str, device: str, generator: torch.Generator) -> None:
    """A row with NaN or inf spoils itself alone."""
    x = torch.randn(6, 40, generator=generator).to(device)
    clean = {norm: norm(x, backend=fused) for norm in (onepass.rms_norm, onepass.layer_norm)}
    x[1, 3], x[4, 0] = torch.nan, torch.inf
    for norm, expected in clean.items():
        y = norm(x, backend=fused)
        assert torch.equal(y[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
        assert y[1].isnan().all()
        assert not y[4, 0].isfinite()


def test_constant_rows(backend: str, device: str) -> None:
    x = torch.full((3, 300), 7.0, device=device)
    assert (onepass.layer_norm(x, backend=backend) == 0).all()
    torch.testing.assert_close(onepass.rms_norm(x, backend=backend), torch.ones_like(x))
    assert (onepass.rms_norm(torch.zeros(3, 300, device=device), backend=backend) == 0).all()


def test_widest_row(fused: str, device: str, generator: torch.Generator) -> None:
    x, weight, bias, dy = (
        torch.randn(shape, generator=generator).to(device) for shape in ((2, 262144), (262144,), (262144,), (2, 262144))
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y, expected = onepass.layer_norm(*leaves, backend=fused), F.layer_norm(x, (262144,), weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    y, expected = onepass.rms_norm(x, weight, backend=fused), F.rms_norm(x, (262144,), weight, 1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31st() -> None:
    x = torch.zeros(2**15 + 3, 2**16, dtype=torch.float16, device="cuda")
    x[-1, 7] = 9.0
    for norm in (onepass.rms_norm, onepass.layer_norm):
        last = x[-1:].clone().requires_grad_()
        expected = norm(last, backend="reference")
        (dlast,) = torch.autograd.grad(expected, last, last.detach())
        x.requires_grad_()
        y = norm(x, backend="triton")
        torch.testing.assert_close(y[-1:], expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, x.detach())[0][-1:], dlast, rtol=1e-2, atol=1e-4)


X, WEIGHT = torch.randn(3, 8), torch.randn(8)
BAD = {
    "list": (lambda: onepass.rms_norm([1.0]), TypeError, "x must be a torch.Tensor, got list"),
    "integers": (lambda: onepass.rms_norm(X.int()), TypeError, "x must be floating point, got int32 (3, 8)"),
    "no dimension": (lambda: onepass.layer_norm(X[0, 0]), ValueError, "with at least 1 column, got ()"),
    "no columns": (lambda: onepass.layer_norm(X[:, :0]), ValueError, "with at least 1 column, got (3, 0)"),
    "weight's shape": (
        lambda: onepass.rms_norm(X, WEIGHT[:7]),
        ValueError,
        "weight must be (columns,) = (8,), got (7,)",
    ),
    "weight's dtype": (lambda: onepass.rms_norm(X, WEIGHT.int()), TypeError, "weight must be floating point"),
    "bias's shape": (
        lambda: onepass.layer_norm(X, WEIGHT, X),
        ValueError,
        "bias must be (columns,) = (8,), got (3, 8)",
    ),
    "bias's device": (lambda: onepass.layer_norm(X, bias=WEIGHT.to("meta")), ValueError, "bias must be on x's device"),
    "residual's shape": (
        lambda: onepass.rms_norm(X, residual=X[:2]),
        ValueError,
        "residual must have x's shape (3, 8)",
    ),
    "residual's dtype": (lambda: onepass.rms_norm(X, residual=X.int()), TypeError, "residual must be floating point"),
    "eps": (lambda: onepass.rms_norm(X, eps=-1e-6), ValueError, "eps must be at least 0"),
    "eps nan": (lambda: onepass.rms_norm(X, eps=float("nan")), ValueError, "eps must be finite, got nan"),
    "eps None": (lambda: onepass.layer_norm(X, eps=None), TypeError, "eps must be a number, got NoneType"),
    "offset": (lambda: onepass.rms_norm(X, offset=1.0), ValueError, "offset is added to the weight, and there is none"),
    "unknown": (lambda: onepass.rms_norm(X, normalized_shape=8), TypeError, "flatten several with x.flatten(-n)"),
    "double": (lambda: onepass.rms_norm(X.double()), onepass.UnsupportedError, "x's dtype float64"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def with_argument(place: int, change: Callable[[Any], Any]) -> Any:
    def broken(launcher: Any) -> Any:
        return lambda *args, **options: launcher(
            *(change(x) if i == place else x for i, x in enumerate(args)), **options
        )

    return broken


def with_result(place: int, change: Callable[[Tensor], Tensor]) -> Any:
    def broken(launcher: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            return tuple(change(x) if i == place else x for i, x in enumerate(launcher(*args, **options)))

        return run

    return broken


def _last_column_forgotten(x: Tensor) -> Tensor:
    return torch.cat((x[..., :-1], torch.zeros_like(x[..., -1:])), -1)


FORWARD_FAULTS = {
    "a thousandth off": with_result(0, lambda y: y * 1.001),
    "residual_out without x": with_result(1, torch.zeros_like),
    "eps forgotten": with_argument(4, lambda eps: 0.0),
    "mean off": with_result(2, lambda mean: mean + 0.01),
    "residual forgotten": with_argument(3, torch.zeros_like),
    "last column not written": with_result(0, _last_column_forgotten),
    "rstd off": with_result(3, lambda rstd: rstd * 1.01),
}
BACKWARD_FAULTS = {
    "dx a thousandth off": with_result(0, lambda dx: dx * 1.001),
    "dweight of a row short": with_argument(0, lambda dy: torch.cat((dy[:-1], torch.zeros_like(dy[-1:])))),
    "dbias a thousandth off": with_result(2, lambda dbias: dbias * 1.001),
    "residual's gradient overwritten": with_argument(1, lambda dresidual: None),
    "mean forgotten": with_argument(5, torch.zeros_like),
}


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        *((kernels.FORWARD, fault) for fault in FORWARD_FAULTS.values()),
        *((kernels.BACKWARD, fault) for fault in BACKWARD_FAULTS.values()),
    ],
    ids=[*FORWARD_FAULTS, *BACKWARD_FAULTS],
)
def test_fault_is_noticed(table: Any, fault: Any, fused: str, device: str, generator: torch.Generator) -> None:
    case = NormCase("faulty", center=True, bias=True, residual=True, eps=1e-2)
    inputs = case.inputs(torch.float32, device, generator)
    conformance.fault_is_noticed(case, inputs, fused, table, fault)


def test_explain(backend: str, device: str) -> None:
    x, weight = X.to(device, copy=True).requires_grad_(), WEIGHT.to(device)
    assert list(onepass.explain("rms_norm", x, weight, backend=backend).backends) == [backend] * 2
    assert list(onepass.explain("layer_norm", x.detach(), weight, weight, backend=backend).backends) == [backend]
