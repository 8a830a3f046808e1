"""What softmax refuses, with messages that name the argument."""

import pytest
import torch

import onepass


def test_no_rows_and_no_columns(backend: str, device: str) -> None:
    x = torch.zeros(2, 0, 7, device=device, requires_grad=True)
    y = onepass.softmax(x, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == dx.shape == x.shape
    with pytest.raises(ValueError, match=r"x must be \(..., columns\) with at least 1 column, got \(7, 0\)"):
        onepass.softmax(torch.zeros(7, 0, device=device), backend=backend)
    with pytest.raises(ValueError, match=r"at least 1 column, got \(\)"):
        onepass.softmax(torch.zeros((), device=device), backend=backend)


def test_dtypes() -> None:
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="x must be floating point, got"):
            onepass.softmax(torch.zeros(2, 3, dtype=dtype))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        onepass.softmax([1.0])  # type: ignore[arg-type]
    double = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(onepass.UnsupportedError, match="float64: float32, bfloat16 and float16 only"):
        onepass.softmax(double)
    assert onepass.softmax(double, backend="reference").dtype is torch.float64


def test_other_spellings() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"'dim': softmax is over the last dimension; move another there"):
        onepass.softmax(x, dim=0)
    with pytest.raises(TypeError, match="'bakend': did you mean backend="):
        onepass.softmax(x, bakend="cpu")
    with pytest.raises(ValueError, match="backend='cppu' is unknown to softmax forward"):
        onepass.softmax(x, backend="cppu")


def test_raw_operations_check_too() -> None:
    y = torch.zeros(2, 3)
    for dy in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"dy must be as y is, float32 \(2, 3\) on cpu, got"):
            torch.ops.onepass.softmax_bwd(dy, y, "reference")


def test_explain() -> None:
    told = onepass.explain("softmax", torch.zeros(2, 3, requires_grad=True), backend="reference")
    assert [choice.op for choice in told] == ["softmax forward", "softmax backward"]
    assert list(told.backends) == ["reference", "reference"]


def test_sparse_tensors_are_refused_with_reasons() -> None:
    with pytest.raises(onepass.UnsupportedError, match="tensors are on cpu with layout sparse_coo"):
        onepass.softmax(torch.eye(3).to_sparse())
