"""append_kv: what it writes is what attention_decode reads; registration, wrong calls, errors write nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import onepass
from onepass.core import kv_formats
from onepass.ops.append_kv.inputs import CASES, AppendCase

_OP = torch.ops.onepass.append_kv


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tensors(generator: torch.Generator, seqlen_new: int = 3, capacity: int = 10) -> list[Tensor]:
    shapes = ((2, seqlen_new, 2, 16), (2, seqlen_new, 2, 8), (2, capacity, 2, 16), (2, capacity, 2, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_writes_the_new_rows_alone(backend: str, generator: torch.Generator) -> None:
    k, v, k_cache, v_cache = tensors(generator)
    before = k_cache.clone(), v_cache.clone()
    lengths = int32(7, 2)
    assert onepass.append_kv(k, v, k_cache, v_cache, lengths, backend=backend) is None
    assert torch.equal(lengths, int32(7, 2))
    for cache, old, new in ((k_cache, before[0], k), (v_cache, before[1], v)):
        for index, start in enumerate((7, 2)):
            old[index, start : start + 3] = new[index]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backends_agree_to_the_last_bit(case: AppendCase, fused: str, generator: torch.Generator) -> None:
    inputs = case.inputs(torch.float16, "cpu", generator)
    if fused not in case.backends(inputs):
        pytest.skip(f"{fused} refuses this case")
    expected = case.call(inputs, "reference")
    for name, x in case.call(inputs, fused).items():
        assert torch.equal(x, expected[name]), name


def test_decode_reads_what_was_appended(backend: str, generator: torch.Generator) -> None:
    """Token by token into pages, then all at once: attention over the keys themselves."""
    k, v, *_ = tensors(generator, seqlen_new=7)
    q = torch.randn(2, 1, 4, 16, generator=generator)
    k_cache, v_cache = (torch.full((6, 4, 2, n), torch.nan) for n in (16, 8))
    table = int32(5, 2, 0, 3).view(2, 2)
    for token in range(7):
        lengths = int32(token, token)
        new = slice(token, token + 1)
        onepass.append_kv(k[:, new], v[:, new], k_cache, v_cache, lengths, page_table=table, backend=backend)
    lengths = int32(7, 7)
    out = onepass.attention_decode(q, k_cache, v_cache, cache_seqlens=lengths, page_table=table, backend="reference")
    torch.testing.assert_close(out, onepass.attention(q, k, v, backend="reference"))


def test_int4_is_the_helper_s(backend: str, generator: torch.Generator) -> None:
    k, v, *_ = tensors(generator)
    caches = [torch.zeros(2, 10, 2, n // 2, dtype=torch.uint8) for n in (16, 8)]
    pairs = [torch.zeros(2, 10, 2, groups, 2, dtype=torch.float16) for groups in (4, 1)]
    options: dict[str, Any] = {"k_scale_shift": pairs[0], "v_scale_shift": pairs[1], "backend": backend}
    onepass.append_kv(k, v, *caches, int32(0, 0), **options)
    for x, cache, pair in ((k, caches[0], pairs[0]), (v, caches[1], pairs[1])):
        packed, scale_shift = onepass.quantize_kv_int4(x, groups=pair.shape[3])
        assert torch.equal(cache[:, :3], packed)
        assert torch.equal(pair[:, :3], scale_shift)
        assert not cache[:, 3:].any()


def test_constant_groups_and_huge_numbers(backend: str) -> None:
    """A group of one number is stored exactly; what fp16 cannot hold is cut."""
    k = torch.full((1, 2, 1, 8), 2.5)
    k[0, 1, 0, :4] = torch.tensor([-1e6, 0.0, 1e6, 3.0])
    cache, pairs = torch.zeros(1, 4, 1, 4, dtype=torch.uint8), torch.zeros(1, 4, 1, 2, 2, dtype=torch.float16)
    other = cache.clone(), pairs.clone()
    options: dict[str, Any] = {"k_scale_shift": pairs, "v_scale_shift": other[1], "backend": backend}
    onepass.append_kv(k, k, cache, other[0], int32(0), **options)
    assert torch.equal(kv_formats.dequantize_int4(cache, pairs)[0, 0, 0], k[0, 0, 0])
    assert pairs.isfinite().all()


def test_opcheck(backend: str, generator: torch.Generator) -> None:
    args = (*tensors(generator), int32(7, 2), None, None, None, None, None, backend)
    torch.library.opcheck(_OP.default, args, test_utils=["test_schema", "test_faketensor"])


def test_writes_are_counted(backend: str, generator: torch.Generator) -> None:
    """Autograd sees that a cache which it has saved was changed."""
    k, v, k_cache, v_cache = tensors(generator)
    weight = torch.ones((), requires_grad=True)
    loss = (weight * k_cache).sum()
    onepass.append_kv(k, v, k_cache, v_cache, int32(7, 2), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_refused(backend: str, generator: torch.Generator) -> None:
    k, v, k_cache, v_cache = tensors(generator)
    before = k_cache.clone()
    with pytest.raises(NotImplementedError, match="append_kv writes in place and passes no gradient on"):
        onepass.append_kv(k.requires_grad_(), v, k_cache, v_cache, int32(7, 2), backend=backend)
    assert torch.equal(k_cache, before)
    with torch.no_grad():
        onepass.append_kv(k, v, k_cache, v_cache, int32(7, 2), backend=backend)
    with torch.inference_mode():
        onepass.append_kv(k, v, k_cache.clone(), v_cache.clone(), int32(7, 2), backend=backend)


def test_compiles_with_at_most_two_graphs(backend: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()

    def step(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        onepass.append_kv(k, v, k_cache, v_cache, lengths, backend=backend)
        return k_cache + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seqlen_new, capacity in ((3, 10), (2, 17), (5, 9)):
        inputs = tensors(generator, seqlen_new, capacity)
        eager = [x.clone() for x in inputs]
        lengths = int32(4, 0)
        torch.testing.assert_close(compiled(*inputs, lengths), step(*eager, lengths))
        assert all(torch.equal(a, b) for a, b in zip(inputs, eager, strict=True))
    assert counter.frame_count <= 2


def append(**changes: Any) -> None:
    """A valid call but for what is given."""
    call: dict[str, Any] = {
        "k": torch.zeros(2, 3, 2, 16),
        "v": torch.zeros(2, 3, 2, 8),
        "k_cache": torch.zeros(2, 10, 2, 16),
        "v_cache": torch.zeros(2, 10, 2, 8),
        "cache_seqlens": int32(7, 2),
    }
    onepass.append_kv(**(call | changes))


_INT8 = {"k_cache": torch.zeros(2, 10, 2, 16).char(), "v_cache": torch.zeros(2, 10, 2, 8).char()}
_INT4 = {"k_cache": torch.zeros(2, 10, 2, 8).byte(), "v_cache": torch.zeros(2, 10, 2, 4).byte()}
_PAIRS = {name: torch.zeros(2, 10, 2, 1, 2).half() for name in ("k_scale_shift", "v_scale_shift")}
_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 3}, TypeError, r"k must be a torch.Tensor, got int"),
    ({"k": torch.zeros(3, 2, 16)}, ValueError, r"k must be \(batch, seqlen_new, nheads_kv, head_dim\), got"),
    ({"v": torch.zeros(2, 4, 2, 8)}, ValueError, r"v must have k's sizes"),
    ({"v": torch.zeros(2, 3, 2, 8).half()}, TypeError, r"v must be float32, got float16"),
    ({"k_cache": torch.zeros(3, 10, 2, 16)}, ValueError, r"k_cache must be \(batch, capacity, nheads_kv, head_dim\)"),
    ({"v_cache": torch.zeros(2, 9, 2, 8)}, ValueError, r"v_cache must have k_cache's first sizes"),
    ({"k_cache": torch.zeros(2, 10, 2, 16).half()}, TypeError, r"k_cache must have k's dtype torch.float32"),
    ({"k_cache": torch.zeros(2, 10, 2, 16).to("meta")}, ValueError, r"k_cache must be on k's device cpu"),
    ({"cache_seqlens": torch.tensor([7, 2])}, TypeError, r"cache_seqlens must be int32, got int64"),
    ({"cache_seqlens": int32(7, 2, 1)}, ValueError, r"cache_seqlens must be \(batch,\) = \(2,\)"),
    (
        {"cache_seqlens": int32(7, 8)},
        ValueError,
        r"cache_seqlens\[1\] is 8: no room for 3 more keys, the cache holds 10",
    ),
    ({"cache_seqlens": int32(-1, 2)}, ValueError, r"cache_seqlens\[0\] is -1"),
    ({"page_table": int32(1, 2)}, ValueError, r"page_table must be \(batch, max_pages\) with batch 2"),
    ({"page_table": int32(0, 5).view(2, 1)}, ValueError, r"page_table\[1, 0\] is 5, but there are 2 pages"),
    (_INT8, ValueError, r"k_descale is needed for k_cache of int8"),
    ({"k_descale": torch.ones(2)}, ValueError, r"k_descale is of int8 and fp8 caches"),
    (
        {**_INT8, "k_descale": torch.ones(3), "v_descale": torch.ones(2)},
        ValueError,
        r"k_descale must be \(nheads_kv,\)",
    ),
    (_INT4, TypeError, r"k_cache must have k's dtype .*int4 needs k_scale_shift"),
    ({**_INT4, "k_scale_shift": _PAIRS["k_scale_shift"]}, ValueError, r"both k_scale_shift and v_scale_shift"),
    ({**_INT4, **_PAIRS, "k_descale": torch.ones(2)}, ValueError, r"not both"),
    ({**_INT4, **_PAIRS, "v_scale_shift": torch.zeros(2, 10, 2, 3, 2).half()}, ValueError, r"groups dividing .* 4"),
    ({"block_table": None}, TypeError, r"'block_table': use page_table="),
    ({"k": torch.zeros(2, 3, 2, 16).to_sparse()}, TypeError, r"k must be a dense, strided"),
]


@pytest.mark.parametrize("case", _BAD, ids=lambda case: next(iter(case[0])))
def test_message(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, error, message = case
    with pytest.raises(error, match=message):
        append(**changes)


def test_errors_write_nothing(backend: str, generator: torch.Generator) -> None:
    k, v, k_cache, v_cache = tensors(generator)
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] is 8"):
        onepass.append_kv(k, v, k_cache, v_cache, int32(0, 8), backend=backend)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


def test_raw_operation_checks_as_well() -> None:
    k = torch.zeros(2, 3, 2, 16)
    with pytest.raises(ValueError, match="k_cache must be"):
        _OP(k, k, k[:1], k, int32(0, 0), None, None, None, None, None, "")
