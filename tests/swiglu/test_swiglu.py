"""swiglu and geglu: against PyTorch's functions, edges, bad input, planted faults, and the modules."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass import nn
from onepass.core.rows import as_rows
from onepass.ops.swiglu import kernels
from onepass.ops.swiglu.inputs import SwigluCase
from onepass.testing import conformance

TWINS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "swiglu": (onepass.swiglu, F.silu),
    "geglu": (onepass.geglu, F.gelu),
    "geglu tanh": (
        lambda *args, **options: onepass.geglu(*args, approximate="tanh", **options),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}


@pytest.mark.parametrize(("ours", "twin"), TWINS.values(), ids=TWINS)
def test_is_pytorchs(ours: Any, twin: Any, backend: str, device: str, generator: torch.Generator) -> None:
    gate, up, dout = (torch.randn(3, 5, 70, generator=generator).to(device) * 3 for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    out, expected = ours(gate, up, backend=backend), twin(gate) * up
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)  # PyTorch's gelu is no closer
    for a, b in zip(
        torch.autograd.grad(out, (gate, up), dout), torch.autograd.grad(expected, (gate, up), dout), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_one_gradient_alone(backend: str, device: str, generator: torch.Generator) -> None:
    gate, up, dout = (torch.randn(4, 9, generator=generator).to(device) for _ in range(3))
    both = [x.clone().requires_grad_() for x in (gate, up)]
    dgate, dup = torch.autograd.grad(onepass.swiglu(*both, backend=backend), both, dout)
    (alone,) = torch.autograd.grad(onepass.swiglu(both[0], up, backend=backend), both[:1], dout)
    assert torch.equal(alone, dgate)
    (alone,) = torch.autograd.grad(onepass.swiglu(gate, both[1], backend=backend), both[1:], dout)
    assert torch.equal(alone, dup)


def test_halves_of_a_projection_are_read_in_place() -> None:
    packed = torch.randn(2, 3, 24)
    for half in packed.chunk(2, -1):
        assert as_rows(half).data_ptr() == half.data_ptr()
        assert as_rows(half).shape == (6, 12)


def test_row_alone_is_the_row_in_a_batch(
    fused: str, device: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    gate, up = (torch.randn(5, 77, generator=generator).to(device, dtype) for _ in range(2))
    out = onepass.swiglu(gate, up, backend=fused)
    for i in range(5):
        assert torch.equal(onepass.swiglu(gate[i], up[i], backend=fused), out[i])


def test_infinite_and_nan(backend: str, device: str) -> None:
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 200.0, -200.0, 1e30, -1e30], device=device)
    up = torch.tensor([1.0, 1.0, 1.0, torch.inf, 1.0, 1.0, 1.0, 1.0], device=device)
    out = onepass.swiglu(gate, up, backend=backend)
    torch.testing.assert_close(out, F.silu(gate) * up, equal_nan=True)
    for approximate in ("none", "tanh"):
        large = gate[3:].clone().requires_grad_()
        out = onepass.geglu(large, up[3:], approximate=approximate, backend=backend)
        torch.testing.assert_close(out, F.gelu(gate[3:], approximate=approximate) * up[3:])
        (slope,) = torch.autograd.grad(out[1:].sum(), large)
        torch.testing.assert_close(slope[1:], torch.tensor([1.0, 0.0, 1.0, 0.0], device=device))


def test_widest_row(fused: str, device: str, generator: torch.Generator) -> None:
    packed, dout = (torch.randn(2, columns, generator=generator).to(device) for columns in (2 * 262144, 262144))
    gate, up = (half.requires_grad_() for half in packed.chunk(2, -1))
    out, expected = onepass.swiglu(gate, up, backend=fused), F.silu(gate) * up
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(out, (gate, up), dout), torch.autograd.grad(expected, (gate, up), dout), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_offsets_past_two_to_the_31st(packed: bool) -> None:
    """Of contiguous tensors, and of the halves of one."""
    if packed:
        gate, up = torch.zeros(2**14 + 3, 2**17, dtype=torch.float16, device="cuda").chunk(2, -1)
    else:
        gate, up = (torch.zeros(2**15 + 3, 2**16, dtype=torch.float16, device="cuda") for _ in range(2))
    gate[-1, 7], up[-1, 7] = 3.0, 2.0
    ends = [x[-1:].clone().requires_grad_() for x in (gate, up)]
    expected = onepass.swiglu(*ends, backend="reference")
    dends = torch.autograd.grad(expected, ends, ends[0].detach())
    whole = [x.requires_grad_() for x in (gate, up)]
    out = onepass.swiglu(*whole, backend="triton")
    torch.testing.assert_close(out[-1:], expected)
    for a, b in zip(torch.autograd.grad(out, whole, gate.detach()), dends, strict=True):
        torch.testing.assert_close(a[-1:], b)


X = torch.randn(3, 8)
BAD = {
    "gate as list": (lambda: onepass.swiglu([1.0], X), TypeError, "gate must be a torch.Tensor, got list"),
    "up missing": (lambda: onepass.geglu(X, None), TypeError, "up must be a torch.Tensor, got NoneType"),
    "integers": (lambda: onepass.swiglu(X.int(), X.int()), TypeError, "gate must be floating point, got int32 (3, 8)"),
    "complex": (lambda: onepass.swiglu(X + 0j, X + 0j), TypeError, "gate must be floating point, got complex64"),
    "no dimension": (lambda: onepass.swiglu(X[0, 0], X[0, 0]), ValueError, "gate must be (..., columns), got ()"),
    "shapes": (lambda: onepass.swiglu(X, X[:2]), ValueError, "up must have gate's shape (3, 8), got (2, 8)"),
    "broadcast": (lambda: onepass.swiglu(X, X[:1]), ValueError, "up must have gate's shape (3, 8), got (1, 8)"),
    "dtypes": (lambda: onepass.swiglu(X, X.half()), TypeError, "up must have gate's dtype float32, got float16 (3, 8)"),
    "devices": (lambda: onepass.swiglu(X, X.to("meta")), ValueError, "up must be on gate's device cpu"),
    "approximate": (lambda: onepass.geglu(X, X, approximate="erf"), ValueError, "must be 'none' or 'tanh', got 'erf'"),
    "unknown": (lambda: onepass.swiglu(X, X, dim=-1), TypeError, "unexpected keyword argument 'dim': gate and up are"),
    "misspelt": (lambda: onepass.geglu(X, X, aproximate="none"), TypeError, "did you mean approximate=?"),
    "backend": (lambda: onepass.swiglu(X, X, backend="cuda"), ValueError, "backend='cuda' is unknown to swiglu"),
    "raw activation": (
        lambda: torch.ops.onepass.swiglu_fwd(X, X, "relu", ""),
        ValueError,
        "activation must be one of silu, gelu, gelu_tanh, got 'relu'",
    ),
    "raw dout": (
        lambda: torch.ops.onepass.swiglu_bwd(X[:2], X, X, "silu", True, True, ""),
        ValueError,
        "dout must have gate's shape (3, 8), got (2, 8)",
    ),
    "double": (lambda: onepass.swiglu(X.double(), X.double()), onepass.UnsupportedError, "gate's dtype float64"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def scaled(place: int, factor: float) -> Any:
    def broken(launcher: Any) -> Any:
        def run(*args: Any) -> Any:
            results = launcher(*args)
            if isinstance(results, Tensor):
                return results * factor
            return tuple(x * factor if i == place else x for i, x in enumerate(results))

        return run

    return broken


def changed(place: int, change: Callable[[Any], Any]) -> Any:
    """The launcher gets another argument."""

    def broken(launcher: Any) -> Any:
        return lambda *args: launcher(*(change(x) if i == place else x for i, x in enumerate(args)))

    return broken


def last_row_forgotten(launcher: Any) -> Any:
    def run(*args: Any) -> Any:
        out = launcher(*args).clone()
        out[-1] = torch.nan
        return out

    return run


FORWARD_FAULTS = {
    "a thousandth off": scaled(0, 1.001),
    "another activation": changed(2, lambda activation: "gelu"),
    "gate and up swapped": lambda launcher: lambda gate, up, activation: launcher(up, gate, activation),
    "last row not written": last_row_forgotten,
}
BACKWARD_FAULTS = {
    "dgate a thousandth off": scaled(0, 1.001),
    "dup a thousandth off": scaled(1, 1.001),
    "dout forgotten": changed(0, torch.ones_like),
    "results swapped": lambda launcher: lambda *args: launcher(*args)[::-1],
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
    case = SwigluCase("packed", layout="packed")
    inputs = case.inputs(torch.float32, device, generator)
    conformance.fault_is_noticed(case, inputs, fused, table, fault)


def test_explain(backend: str, device: str) -> None:
    gate, up = torch.randn(3, 8, device=device, requires_grad=True), X.to(device)
    assert list(onepass.explain("swiglu", gate, up, backend=backend).backends) == [backend] * 2
    assert list(onepass.explain("geglu", up, up, approximate="tanh", backend=backend).backends) == [backend]


def test_modules(backend: str, device: str, generator: torch.Generator) -> None:
    gate_up = torch.randn(2, 3, 16, generator=generator).to(device)
    gate, up = gate_up.chunk(2, -1)
    module = nn.SwiGLU(backend=backend)
    assert torch.equal(module(gate, up), onepass.swiglu(gate, up, backend=backend))
    assert torch.equal(module.packed(gate_up), module(gate, up))
    tanh = nn.GeGLU("tanh", backend=backend)
    assert torch.equal(tanh.packed(gate_up), onepass.geglu(gate, up, approximate="tanh", backend=backend))
    assert not tanh.state_dict()
    assert repr(tanh) == f"GeGLU(approximate='tanh', backend={backend!r})"
    with pytest.raises(ValueError, match=r"gate_up must be \(\.\.\., 2 \* columns\), got \(2, 3, 15\)"):
        module.packed(gate_up[..., :15])
    with pytest.raises(ValueError, match="approximate must be"):
        nn.GeGLU("erf")
