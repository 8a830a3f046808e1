"""What the losses refuse, with messages that name the argument."""

from typing import Any

import pytest
import torch

import onepass
from onepass.ops.cross_entropy.api import cross_entropy, linear_cross_entropy

_LOGITS, _TARGET = torch.zeros(4, 7), torch.tensor([1, 2, 3, 6])
_X, _WEIGHT = torch.zeros(4, 3), torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be 0 to 1, got 1\.5"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be finite"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
        ({"softcap": "3"}, TypeError, "softcap must be a number, got str"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an int, got 1\.0"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index must fit into 64 bits, as targets do, got 9223"),
        ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
        ({"weight": torch.ones(7)}, TypeError, "class weights are not supported"),
        ({"logit_softcapping": 3.0}, TypeError, "use softcap="),
        ({"smoothing": 0.1}, TypeError, "did you mean label_smoothing="),
        ({"backend": "cppu"}, ValueError, "backend='cppu' is unknown to cross_entropy forward"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(_LOGITS, _TARGET, **options)
    if "weight" not in options:
        with pytest.raises(error, match=message):
            linear_cross_entropy(_X, _WEIGHT, _TARGET, **options)


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (_LOGITS.long(), _TARGET, TypeError, r"logits must be floating point, got int64 \(4, 7\)"),
        (_LOGITS, _TARGET.float(), TypeError, "target must hold class indices, int64, got float32"),
        (_LOGITS, torch.zeros(4, 7), TypeError, "class probabilities are not supported"),
        (_LOGITS, _TARGET.bool(), TypeError, "target must be int64, got bool"),
        (_LOGITS, _TARGET[:3], ValueError, r"target must be \(4,\), a class for each row, got \(3,\)"),
        (_LOGITS.view(2, 2, 7), _TARGET, ValueError, r"classes last, got target \(4,\) and logits \(2, 2, 7\)"),
        (torch.zeros(4, 0), _TARGET, ValueError, r"at least 1 class, got \(4, 0\)"),
        (torch.zeros(()), _TARGET, ValueError, r"target must be \(\.\.\.\) for logits"),
        ([1.0], _TARGET, TypeError, r"logits must be a torch\.Tensor, got list"),
        (_LOGITS, 3, TypeError, r"target must be a torch\.Tensor, got int"),
    ],
)
def test_logits_and_target(logits: Any, target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(logits, target)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": _X.int()}, TypeError, "x must be floating point, got int32"),
        ({"x": _X[0, 0]}, ValueError, r"target must be \(\.\.\.\) for x \(\.\.\., features\)"),
        ({"weight": _WEIGHT.T}, ValueError, r"weight must be \(classes, features\) = \(classes, 3\), got \(3, 7\)"),
        ({"weight": _WEIGHT.long()}, TypeError, "weight must be floating point, got int64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(classes,\) = \(7,\), got \(3,\)"),
        ({"bias": 1.0}, TypeError, r"bias must be a torch\.Tensor, got float"),
        ({"low_memory": 1}, TypeError, "low_memory must be True or False"),
        ({"target": _TARGET[:2]}, ValueError, r"target must be \(4,\)"),
    ],
)
def test_linear(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"x": _X, "weight": _WEIGHT, "target": _TARGET} | changes
    with pytest.raises(error, match=message):
        linear_cross_entropy(call.pop("x"), call.pop("weight"), call.pop("target"), **call)


def test_smaller_integers_are_targets_too(backend: str, device: str) -> None:
    logits, target = _LOGITS.to(device), _TARGET.to(device)
    expected = onepass.cross_entropy(logits, target, backend=backend)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(onepass.cross_entropy(logits, target.to(dtype), backend=backend), expected)


def test_fp64_is_the_references_alone() -> None:
    with pytest.raises(onepass.UnsupportedError, match="float64: float32, bfloat16 and float16 only"):
        onepass.cross_entropy(_LOGITS.double(), _TARGET)
    assert onepass.cross_entropy(_LOGITS.double(), _TARGET, backend="reference").dtype is torch.float64


def test_raw_operations_check_too() -> None:
    rows = torch.zeros(4)
    call = (_LOGITS, _TARGET, rows, -100, 0.0, 0.0, 0.0, "reference")
    with pytest.raises(ValueError, match=r"dloss must be float32 \(4,\) on cpu, got float32 \(3,\)"):
        torch.ops.onepass.cross_entropy_bwd(rows[:3], None, *call)
    with pytest.raises(ValueError, match="dlse must be float32"):
        torch.ops.onepass.cross_entropy_bwd(rows, rows.double(), *call)
    with pytest.raises(ValueError, match=r"logits must be \(rows, classes\)"):
        torch.ops.onepass.cross_entropy_fwd(_LOGITS[0], _TARGET, -100, 0.0, 0.0, 0.0, "mean", "reference")


def test_explain() -> None:
    told = onepass.explain("cross_entropy", _LOGITS.clone().requires_grad_(), _TARGET, backend="reference")
    assert [choice.op for choice in told] == ["cross_entropy forward", "cross_entropy backward"]
    told = onepass.explain("linear_cross_entropy", _X, _WEIGHT, _TARGET, bias=None, backend="reference")
    assert [choice.op for choice in told] == ["cross_entropy forward"]
