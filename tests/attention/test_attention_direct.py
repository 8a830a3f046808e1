"""The short way of plain calls (csrc/direct.cpp): the bits of the ordinary way, and no call that is not its own."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.core import cpu_library
from onepass.ops.attention import cpu, kernels
from onepass.ops.attention.inputs import CASES, AttentionCase, DecodeCase

pytestmark = pytest.mark.skipif(
    not cpu_library.has_direct_calls(), reason="this PyTorch lacks part of its stable C interface"
)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call that the direct launchers saw was taken."""
    seen: list[bool] = []

    def spy(launcher: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def run(call: tuple[Any, ...]) -> Tensor | None:
            out = launcher(call)
            seen.append(out is not None)
            return out

        return run

    for table, name in ((kernels.FORWARD, "direct_forward"), (kernels.DECODE, "direct_decode")):
        monkeypatch.setattr(cpu, name, spy(getattr(cpu, name)))
        table.forget()
    yield seen
    monkeypatch.undo()
    for table in (kernels.FORWARD, kernels.DECODE):
        table.forget()


def run(case: AttentionCase | DecodeCase, inputs: dict[str, Tensor], **more: Any) -> Any:
    if isinstance(case, DecodeCase):
        caches = inputs["k_cache"], inputs["v_cache"]
        return onepass.attention_decode(inputs["q"], *caches, **case.options(inputs), **more)
    return onepass.attention(inputs["q"], inputs["k"], inputs["v"], **case.options(inputs), **more)


@pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(case, AttentionCase | DecodeCase)], ids=lambda case: case.name
)
def test_the_direct_way_gives_the_bits_of_the_ordinary_way(
    case: AttentionCase | DecodeCase, dtype: torch.dtype, answers: list[bool]
) -> None:
    inputs = case.inputs(dtype, "cpu", torch.Generator().manual_seed(1))
    if "cpu" not in case.backends(inputs):
        pytest.skip("the cpu backend does not do this case")
    out, _ = run(case, inputs, return_lse=True)
    assert answers in ([], [False])  # attention does not ask when lse is wanted, attention_decode is declined
    answers.clear()
    direct = run(case, inputs)
    assert answers == ["key_mask" not in inputs]
    assert torch.equal(direct, out)
    assert (direct.stride(), direct.dtype) == (out.stride(), out.dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(2, 9, 2, 16)},  # dtype
        {"k": torch.zeros(2, 9, 2, 8).double()},  # head_dim
        {"v": torch.zeros(2, 8, 2, 16).double()},  # seqlen
        {"q": torch.zeros(2, 9, 3, 16).double()},  # heads that do not divide
        {"q": torch.zeros(2, 9, 2, 16, device="meta")},
        {"q": torch.zeros(9, 2, 16)},
        {"v": torch.zeros(2, 9, 2, 16).double().to_sparse()},
        {},  # fp64
    ],
)
def test_what_is_not_plain_goes_the_ordinary_way(change: dict[str, Tensor], answers: list[bool]) -> None:
    inputs = {name: torch.zeros(2, 9, 2, 16).double() for name in "qkv"} | change
    with pytest.raises((ValueError, TypeError, onepass.UnsupportedError, RuntimeError)):
        onepass.attention(inputs["q"], inputs["k"], inputs["v"])
    assert not any(answers)


def test_a_length_past_the_cache_is_declined_and_explained(answers: list[bool]) -> None:
    q, cache = torch.zeros(2, 1, 2, 16), torch.zeros(2, 5, 2, 16)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] is 6"):
        onepass.attention_decode(q, cache, cache, cache_seqlens=torch.tensor([5, 6], dtype=torch.int32))
    assert answers == [False]


def test_another_backend_is_not_asked(answers: list[bool]) -> None:
    q = torch.zeros(1, 3, 2, 16)
    onepass.attention(q, q, q, backend="reference")
    with onepass.use_backend("reference"):
        onepass.attention(q, q, q)
    assert answers == []


def test_handles_do_not_leak() -> None:
    q, k = torch.zeros(1, 1, 2, 16), torch.zeros(1, 70, 2, 16)
    lengths = torch.tensor([7], dtype=torch.int32)
    use_counts = [x._use_count() for x in (q, k, lengths)]
    for wanted in (lengths, None, torch.tensor([71], dtype=torch.int32)):
        with suppress(ValueError):  # the last is past the cache
            onepass.attention_decode(q, k, k, cache_seqlens=wanted)
    onepass.attention(q, k, k)
    assert [x._use_count() for x in (q, k, lengths)] == use_counts
    assert onepass.attention(q, k, k)._use_count() == 1
    assert onepass.attention_decode(q, k, k)._use_count() == 1


class Wrapper(torch.Tensor):
    """A subclass that holds a tensor and has no memory of its own."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapper":
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.held if isinstance(x, Wrapper) else x

        return func(*map(unwrap, args), **{name: unwrap(x) for name, x in (kwargs or {}).items()})


def test_wrapped_options_go_through_the_dispatcher() -> None:
    q, k, do = (torch.randn(2, 5, 2, 16) for _ in range(3))
    lengths, mask = torch.tensor([2, 3], dtype=torch.int32), torch.arange(5).expand(2, 5) < 3
    expected = onepass.attention_decode(q[:, :1], k, k, cache_seqlens=lengths)
    assert torch.equal(onepass.attention_decode(q[:, :1], k, k, cache_seqlens=Wrapper(lengths)), expected)
    assert torch.equal(onepass.attention(q, k, k, key_mask=Wrapper(mask)), onepass.attention(q, k, k, key_mask=mask))
    q.requires_grad_()
    wrapped, plain = (
        torch.autograd.grad(onepass.attention(q, k, k, key_mask=key_mask), q, do)[0]
        for key_mask in (Wrapper(mask), mask)
    )
    assert torch.equal(wrapped, plain)


def test_batched_and_zero_gradients() -> None:
    q, k, v = (torch.randn(2, 5, 2, 16, requires_grad=True) for _ in range(3))
    out, dos = onepass.attention(q, k, v), torch.randn(3, 2, 5, 2, 16)
    (batched,) = torch.autograd.grad(out, q, dos, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(out, q, do, retain_graph=True)[0] for do in dos]
    torch.testing.assert_close(batched, torch.stack(loop))
    (zero,) = torch.autograd.grad(out, q, torch._efficientzerotensor(2, 5, 2, 16))
    assert torch.equal(zero, torch.zeros_like(q))


def test_head_dims_that_the_kernels_lack_are_declined(answers: list[bool]) -> None:
    q, v = torch.zeros(1, 2, 1, 257), torch.zeros(1, 2, 1, 16)
    for tensors in ((q, q, v), (v, v, q)):
        with pytest.raises(onepass.UnsupportedError, match="257 is above 256"):
            onepass.attention(*tensors)
    assert answers == [False, False]
