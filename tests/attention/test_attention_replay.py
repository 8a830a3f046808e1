"""Plain calls of attention that csrc/replay.cpp does again: the bits of the ordinary way, and only what it knows."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.core import cpu_library, replay
from onepass.ops.attention import kernels, registration
from onepass.ops.attention.inputs import CASES, AttentionCase, DecodeCase
from onepass.testing.replays import SEEN, Ordinary

pytestmark = pytest.mark.skipif(
    cpu_library.host_functions() is None, reason="this PyTorch lacks the C interface that replays need"
)


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
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
def test_a_replay_gives_the_bits_of_the_ordinary_way(
    case: AttentionCase | DecodeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = case.inputs(dtype, "cpu", torch.Generator().manual_seed(1))
    if "cpu" not in case.backends(inputs):
        pytest.skip("the cpu backend does not do this case")
    calls = registration.decoded if isinstance(case, DecodeCase) else registration.attended
    ordinary = Ordinary(calls, monkeypatch)
    with replay.paused():
        expected = run(case, inputs, return_lse=True)
    for _ in range(SEEN + 1):
        outputs = run(case, inputs, return_lse=True)
    assert ordinary.count == 1 + 2, "the call was not replayed"
    for x, other in zip(outputs, expected, strict=True):
        assert torch.equal(x, other)
        assert (x.stride(), x.dtype) == (other.stride(), other.dtype)
    assert torch.equal(run(case, inputs), expected[0])


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
def test_what_is_not_plain_goes_the_ordinary_way(change: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: torch.zeros(2, 9, 2, 16).double() for name in "qkv"} | change
    ordinary = Ordinary(registration.attended, monkeypatch)
    for _ in range(SEEN + 1):
        with pytest.raises((ValueError, TypeError, onepass.UnsupportedError, RuntimeError)):
            onepass.attention(inputs["q"], inputs["k"], inputs["v"])
    assert ordinary.count == SEEN + 1


def test_a_length_past_the_cache_is_explained() -> None:
    q, cache, fits = torch.zeros(2, 1, 2, 16), torch.zeros(2, 5, 2, 16), torch.tensor([5, 4], dtype=torch.int32)
    for _ in range(SEEN):
        onepass.attention_decode(q, cache, cache, cache_seqlens=fits)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] is 6"):
        onepass.attention_decode(q, cache, cache, cache_seqlens=torch.tensor([5, 6], dtype=torch.int32))


def test_another_backend_is_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 3, 2, 16)
    for _ in range(SEEN):
        onepass.attention(q, q, q)
    ordinary = Ordinary(registration.attended, monkeypatch)
    onepass.attention(q, q, q)
    assert ordinary.count == 0
    onepass.attention(q, q, q, backend="reference")
    with onepass.use_backend("reference"):
        onepass.attention(q, q, q)
    assert ordinary.count == 2


def test_another_precision_of_products_is_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs kernels are chosen by it."""
    q = torch.zeros(1, 3, 2, 16)
    for _ in range(SEEN):
        onepass.attention(q, q, q)
    ordinary = Ordinary(registration.attended, monkeypatch)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = not before
        onepass.attention(q, q, q)
        assert ordinary.count == 1
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    onepass.attention(q, q, q)
    assert ordinary.count == 1


def test_handles_do_not_leak() -> None:
    q, k = torch.zeros(1, 1, 2, 16), torch.zeros(1, 70, 2, 16)
    lengths = torch.tensor([7], dtype=torch.int32)
    use_counts = [x._use_count() for x in (q, k, lengths)]
    for wanted in (lengths, None, torch.tensor([71], dtype=torch.int32)):
        for _ in range(SEEN + 1):
            with suppress(ValueError):  # the last is past the cache
                onepass.attention_decode(q, k, k, cache_seqlens=wanted)
    for _ in range(SEEN + 1):
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


def test_head_dims_that_the_kernels_lack_are_declined() -> None:
    q, v = torch.zeros(1, 2, 1, 257), torch.zeros(1, 2, 1, 16)
    for tensors in ((q, q, v), (v, v, q)):
        for _ in range(SEEN + 1):
            with pytest.raises(onepass.UnsupportedError, match="257 is above 256"):
                onepass.attention(*tensors)
