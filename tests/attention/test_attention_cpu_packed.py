"""The C++ kernels on packed sequences: one call is a call of attention for each sequence, with every option."""

from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.core import cpu_library
from onepass.ops.attention import cpu, reference
from onepass.testing.inputs import normal

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason="needs the C++ library")

_LENGTHS = [(33, 33), (0, 9), (130, 70), (1, 200), (7, 0), (64, 64)]
_HEADS_Q, _HEADS_KV, _DIM, _DIM_V = 4, 2, 40, 24
_SCALE = _DIM**-0.5
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "top left": {"right": 0, "bottom_right": False},
    "window": {"left": 20, "right": 5},
    "softcap, alibi": {"softcap": 3.0, "alibi": True, "right": 0},
    "bias": {"bias": (0, 0, 0, 0)},
    "bias, one batch": {"bias": (1, 0, 0, 0), "right": 0},
    "bias, one head and query": {"bias": (0, 1, 1, 0)},
    "sink": {"sink": True, "right": 0},
    "key_mask": {"key_mask": True},
    "used": {"used": True, "right": 0},
}


def cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def compare(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.double().nan_to_num(neginf=0.0).abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=_TOLERANCE[dtype] * scale, msg=lambda text: f"{name}: {text}"
    )


class Problem:
    """Packed tensors with the options of a name, and what each sequence has of them."""

    def __init__(self, name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.options = options = OPTIONS[name]
        lengths_q, lengths_k = (list(x) for x in zip(*_LENGTHS, strict=True))
        self.used = [x // 2 for x in lengths_k] if options.get("used") else lengths_k
        self.cu_q, self.cu_k = cumulated(lengths_q), cumulated(lengths_k)
        total_q, total_k, batch = sum(lengths_q), sum(lengths_k), len(_LENGTHS)
        self.longest = max(lengths_q), max(self.used)

        def draw(*shape: int) -> Tensor:
            return normal(shape, dtype, "cpu", generator)

        self.q = draw(_HEADS_Q, total_q, _DIM).transpose(0, 1)
        self.k, self.v = draw(total_k, _HEADS_KV, _DIM), draw(total_k, _HEADS_KV, _DIM_V)
        self.do, self.dlse = draw(total_q, _HEADS_Q, _DIM_V), torch.randn(_HEADS_Q, total_q, generator=generator)
        self.bias: Tensor | None = None
        if "bias" in options:
            full = (batch, _HEADS_Q, *self.longest)
            self.bias = draw(*(size or whole for size, whole in zip(options["bias"], full, strict=True)))
        self.slopes = torch.rand((batch, _HEADS_Q), generator=generator) if options.get("alibi") else None
        self.sink = draw(_HEADS_Q) if options.get("sink") else None
        self.mask = torch.rand(total_k, generator=generator) < 0.6 if options.get("key_mask") else None

    @property
    def optional(self) -> tuple[Tensor | None, ...]:
        return self.bias, self.slopes, self.sink, self.mask, None

    @property
    def numbers(self) -> tuple[Any, ...]:
        get = self.options.get
        return (
            _SCALE, get("left", -1), get("right", -1), get("bottom_right", True), get("softcap", 0.0), 0.0, False,
        )  # fmt: skip

    @property
    def lengths(self) -> tuple[Tensor, Tensor, Tensor | None]:
        used = torch.tensor(self.used, dtype=torch.int32) if self.options.get("used") else None
        return self.cu_q, self.cu_k, used

    def sequence(self, b: int) -> tuple[slice, slice, tuple[Tensor | None, ...]]:
        queries = slice(int(self.cu_q[b]), int(self.cu_q[b + 1]))
        keys = slice(int(self.cu_k[b]), int(self.cu_k[b]) + self.used[b])
        bias = self.bias
        if bias is not None:
            bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
            bias = bias[:, :, : queries.stop - queries.start if bias.shape[2] > 1 else 1]
            bias = bias[..., : self.used[b] if bias.shape[3] > 1 else 1]
        slopes = None if self.slopes is None else self.slopes[b]
        mask = None if self.mask is None else self.mask[keys].unsqueeze(0)
        return queries, keys, (bias, slopes, self.sink, mask, None)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_is_a_loop(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    problem = Problem(name, dtype, generator)
    out, lse = cpu.forward_packed(
        problem.q, problem.k, problem.v, *problem.lengths, None, *problem.optional, *problem.longest, *problem.numbers
    )
    needs = (True, True, problem.bias is not None, problem.sink is not None)
    dlse = torch.where(lse.isfinite(), problem.dlse, 0.0)
    dq, dk, dv, dbias, dsink = cpu.backward_packed(
        problem.do, dlse, problem.q, problem.k, problem.v, out, lse, *problem.lengths, *problem.optional,
        *problem.longest, *problem.numbers, *needs,
    )  # fmt: skip
    summed_bias = torch.zeros_like(dbias, dtype=torch.float64)
    summed_sink = torch.zeros_like(dsink, dtype=torch.float64)
    unused = torch.ones(len(problem.k), dtype=torch.bool)
    for b in range(len(_LENGTHS)):
        queries, keys, optional = problem.sequence(b)
        unused[keys] = False
        one = tuple(x.unsqueeze(0) for x in (problem.q[queries], problem.k[keys], problem.v[keys]))
        expected_out, expected_lse = reference.forward(*one, *optional, *problem.numbers)
        compare(f"out {b}", out[queries], expected_out[0], dtype)
        compare(f"lse {b}", lse[:, queries], expected_lse[0], dtype)
        gradients = reference.backward(
            problem.do[queries].unsqueeze(0), dlse[:, queries].unsqueeze(0), *one, expected_out, expected_lse,
            *optional, *problem.numbers, *needs,
        )  # fmt: skip
        for what, found, expected in zip(
            ("dq", "dk", "dv"), (dq[queries], dk[keys], dv[keys]), gradients, strict=False
        ):
            compare(f"{what} {b}", found, expected[0], dtype)
        if problem.bias is not None:
            _, _, rows, columns = gradients[3].shape
            part = summed_bias if problem.bias.shape[0] == 1 else summed_bias[b : b + 1]
            part[:, :, :rows, :columns] += gradients[3]
        if problem.sink is not None:
            summed_sink += gradients[4]
    compare("dbias", dbias, summed_bias, dtype)
    compare("dsink", dsink, summed_sink, dtype)
    assert not dk[unused].any()
    assert not dv[unused].any()


def test_equal_lengths_are_a_batch(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Bit for bit, with the same mask of dropout."""
    batch, seqlen = 3, 90
    q, k, v, do = (normal((batch, seqlen, 4, 32), dtype, "cpu", generator) for _ in range(4))
    rng = torch.tensor([123, 9])
    numbers = (0.2, -1, 0, True, 0.0, 0.25, False)
    expected = cpu.forward(q, k, v, None, None, None, None, rng, *numbers)
    places = cumulated([seqlen] * batch)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed = places, places, None
    found = cpu.forward_packed(*flat, *packed, None, None, None, None, None, rng, seqlen, seqlen, *numbers)
    assert torch.equal(found[0].view_as(expected[0]), expected[0])
    assert torch.equal(found[1].view(4, batch, seqlen).transpose(0, 1), expected[1])
    needs = (True, True, False, False)
    options = (None, None, None, None, rng)
    wanted = cpu.backward(do, None, q, k, v, *expected, *options, *numbers, *needs)
    got = cpu.backward_packed(
        do.flatten(0, 1), None, *flat, *found, *packed, *options, seqlen, seqlen, *numbers, *needs
    )
    for one, other in zip(got[:3], wanted, strict=False):
        assert torch.equal(one.view_as(other), other)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_pages_are_the_keys_they_hold(page_size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Chunked prefill: a few queries at the end of each sequence's keys, which lie in pages; unused ones hold NaN."""
    queries, used = [5, 64, 1, 30], torch.tensor([40, 64, 0, 131], dtype=torch.int32)
    capacity = -(-int(used.max()) // page_size)
    pages = torch.randperm(2 * 4 * capacity, generator=generator)[: 4 * capacity].view(4, capacity)
    table = torch.where(torch.arange(capacity) * page_size < used.unsqueeze(1), pages, -7).to(torch.int32)
    k, v = (torch.full((2 * 4 * capacity, page_size, 2, 32), torch.nan, dtype=dtype) for _ in range(2))
    flat = [normal((int(used.sum()), 2, 32), dtype, "cpu", generator) for _ in range(2)]
    places = cumulated(used.tolist())
    for cache, rows in zip((k, v), flat, strict=True):
        for b in range(4):
            for j in range(int(used[b])):
                cache[table[b, j // page_size], j % page_size] = rows[places[b] + j]
    q = normal((sum(queries), 4, 32), dtype, "cpu", generator)
    options = (None, None, None, None, None, 64, 131, 0.2, -1, 0, True, 0.0, 0.0, False)
    found = cpu.forward_packed(q, k, v, cumulated(queries), None, used, table, *options)
    expected = cpu.forward_packed(q, *flat, cumulated(queries), places, None, None, *options)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    table[3, 0] = len(k)
    with pytest.raises(IndexError):
        cpu.forward_packed(q, k, v, cumulated(queries), None, used, table, *options)


@pytest.mark.parametrize(
    "lengths", [[0, 3, 2, 8], [1, 3, 5, 8], [0, 3, 5, 7], [0, 3, 5, 9]], ids=["decrease", "start", "short", "long"]
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    q = torch.randn(8, 2, 16)
    places, good = torch.tensor(lengths, dtype=torch.int32), torch.tensor([0, 3, 5, 8], dtype=torch.int32)
    options = (None, None, None, None, None, None, None, 9, 9, 0.2, -1, -1, True, 0.0, 0.0, False)
    cpu.forward_packed(q, q, q, good, good, *options)
    with pytest.raises(IndexError):
        cpu.forward_packed(q, q, q, places, good, *options)
    with pytest.raises(IndexError):
        cpu.forward_packed(q, q, q, good, places, *options)
