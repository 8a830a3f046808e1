"""Choosing a kernel: priorities, reasons, names, the cache, use_backend, explain."""

import threading
from typing import NamedTuple

import pytest
import torch

import onepass
from onepass.core.registry import Kernel, KernelTable, backend_in_use, choose, select


class Spec(NamedTuple):
    size: int
    odd: bool = False


def fast(*args: object) -> str:
    return "fast"


def slow(*args: object) -> str:
    return "slow"


def _fast_unsupported(spec: Spec) -> list[str]:
    return (["odd sizes"] if spec.odd else []) + ([f"size {spec.size} is above 10"] if spec.size > 10 else [])


def make_table(missing: str | None = None) -> KernelTable:
    return KernelTable(
        "work",
        Spec,
        [
            Kernel("plain", 0, lambda spec: [], f"{__name__}:slow", by_name_only=True),
            Kernel("fast", 10, _fast_unsupported, f"{__name__}:fast", unavailable=lambda: missing),
            Kernel("steady", 5, lambda spec: [], f"{__name__}:slow", slow=lambda spec: ["one thread"]),
        ],
    )


def test_highest_priority_without_reasons_wins() -> None:
    table = make_table()
    assert table.backends == ["fast", "steady", "plain"]
    assert select(table, (3, False))() == "fast"
    assert select(table, (3, True))() == "slow"
    assert choose(table, (3, False)).backend == "fast"
    assert choose(table, (3, True)).backend == "steady"


def test_a_named_backend_never_falls_back() -> None:
    table = make_table()
    with pytest.raises(onepass.UnsupportedError, match="odd sizes; size 11 is above 10") as failure:
        select(table, (11, True), "fast")
    assert "steady: backend='fast' was asked for" in str(failure.value)
    assert "the call: size=11, odd=True" in str(failure.value)
    assert isinstance(failure.value, NotImplementedError)
    with pytest.raises(ValueError, match="backend='fats' is unknown to work: its backends are fast, steady, plain"):
        select(table, (3, False), "fats")


def test_by_name_only() -> None:
    table = make_table()
    assert choose(table, (3, False), "plain").backend == "plain"
    table.kernels = [kernel for kernel in table.kernels if kernel.backend != "steady"]
    with pytest.raises(onepass.UnsupportedError, match="plain: used only when asked for by name"):
        select(table, (3, True))


def test_what_the_machine_lacks_is_a_reason() -> None:
    table = make_table(missing="no compiler")
    assert table.usable == ["steady", "plain"]
    choice = choose(table, (3, False))
    assert choice.backend == "steady"
    assert str(choice) == (
        "work: steady\n  fast: no compiler\n  steady: chosen\n    slow: one thread\n"
        "  plain: used only when asked for by name (backend='plain')"
    )


def test_choices_are_cached_by_spec() -> None:
    table = make_table()
    first = select(table, (3, False))
    table.kernels = []
    assert select(table, Spec(3)) is first
    table.forget()
    with pytest.raises(onepass.UnsupportedError):
        select(table, (3, False))


def test_use_backend_nests_and_belongs_to_the_thread() -> None:
    seen: list[str] = []
    outer = onepass.use_backend("outer")
    with outer:
        with onepass.use_backend("inner"):
            assert backend_in_use() == "inner"
        with pytest.raises(KeyError), onepass.use_backend("failing"):
            raise KeyError
        thread = threading.Thread(target=lambda: seen.append(backend_in_use()))
        thread.start()
        thread.join()
        with outer:
            assert backend_in_use() == "outer"
        assert backend_in_use() == "outer"
    assert seen == [""]
    assert backend_in_use() == ""
    with pytest.raises(ValueError, match="use_backend takes a backend's name"):
        onepass.use_backend("")


def test_use_backend_decides_and_an_argument_goes_before_it() -> None:
    q = torch.randn(1, 4, 1, 300)
    with onepass.use_backend("reference"):
        onepass.attention(q, q, q)
        with pytest.raises(onepass.UnsupportedError):
            onepass.attention(q, q, q, backend="cpu")
    with onepass.use_backend("cpu"), pytest.raises(onepass.UnsupportedError):
        onepass.attention(q, q, q)


def test_explain_tells_forward_and_backward() -> None:
    q = torch.randn(1, 4, 1, 16, requires_grad=True)
    big = torch.randn(1, 4, 1, 300)
    told = onepass.explain("attention", q, q, q, causal=True)
    assert [choice.op for choice in told] == ["attention forward", "attention backward"]
    assert "cpu: chosen" in str(told)
    assert "reference: used only when asked for by name" in str(told)
    refused = onepass.explain("attention", big, big, big)
    assert [choice.backend for choice in refused] == [None]
    assert "cpu: head_dim 300 is above 256" in str(refused)
    by_name = onepass.explain("attention_decode", q.detach(), q.detach(), q.detach(), backend="reference")
    assert "slow: plain PyTorch" in str(by_name)
    merged = onepass.explain("merge_attention", torch.zeros(2, 1, 4, 1, 16), torch.zeros(2, 1, 1, 4))
    assert list(merged.backends) == ["cpu"]


def test_explain_checks_as_the_call_does() -> None:
    q = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match="explain knows no operation 'atention': choose from append_kv, attention"):
        onepass.explain("atention", q, q, q)
    with pytest.raises(TypeError, match="'causl': did you mean causal"):
        onepass.explain("attention", q, q, q, causl=True)
    with pytest.raises(ValueError, match="k must have q's head_dim"):
        onepass.explain("attention", q, q[..., :3], q)
