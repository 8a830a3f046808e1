"""Wrong calls: the exception's type, and a message that names the argument, what came and what was expected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass

INF, NAN = float("inf"), float("nan")


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Any:
    """A valid call but for what is given."""
    q = tensor(2, 5, 4, 16) if q is None else q
    k = tensor(2, 7, 2, 16) if k is None else k
    v = tensor(2, 7, 2, 8) if v is None else v
    return onepass.attention(q, k, v, **options)


def decode(q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Any:
    q = tensor(2, 1, 4, 16) if q is None else q
    k = tensor(2, 7, 2, 16) if k is None else k
    v = tensor(2, 7, 2, 8) if v is None else v
    return onepass.attention_decode(q, k, v, **options)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


half = torch.float16
_INT4 = {"k": tensor(2, 7, 2, 8, dtype=torch.uint8), "v": tensor(2, 7, 2, 4, dtype=torch.uint8)}
_PAIRS = tensor(2, 7, 2, 1, 2, dtype=half)
_BOTH = {"k_scale_shift": _PAIRS, "v_scale_shift": _PAIRS}
Case = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]
CASES: list[Case] = [
    (attend, {"q": 3}, TypeError, r"q must be a torch.Tensor, got int"),
    (attend, {"k": [1.0]}, TypeError, r"k must be a torch.Tensor, got list"),
    (attend, {"q": tensor(5, 4, 16)}, ValueError, r"q must be \(batch, seqlen_q, .*got \(5, 4, 16\)"),
    (attend, {"q": tensor()}, ValueError, r"q must be \(batch, seqlen_q"),
    (attend, {"v": tensor(1, 2, 7, 2, 8)}, ValueError, r"v must be \(batch, seqlen_k"),
    (attend, {"q": tensor(2, 5, 3, 16)}, ValueError, r"q's 3 heads must be a multiple of k's 2"),
    (attend, {"q": tensor(2, 5, 0, 16)}, ValueError, r"q's 0 heads"),
    (attend, {"k": tensor(2, 7, 0, 16), "v": tensor(2, 7, 0, 8)}, ValueError, r"multiple of k's 0"),
    (attend, {"k": tensor(3, 7, 2, 16)}, ValueError, r"k must have q's batch size 2, got \(3, 7, 2, 16\)"),
    (attend, {"k": tensor(2, 7, 2, 12)}, ValueError, r"k must have q's head_dim 16 .*got \(2, 7, 2, 12\)"),
    (attend, {"v": tensor(2, 6, 2, 8)}, ValueError, r"v must have k's sizes \(2, 7, 2, 16\) but for the last"),
    (attend, {"v": tensor(2, 7, 1, 8)}, ValueError, r"v must have k's sizes"),
    (attend, {"q": tensor(2, 5, 4, 0), "k": tensor(2, 7, 2, 0)}, ValueError, r"q's head dimension .* at least 1"),
    (attend, {"v": tensor(2, 7, 2, 0)}, ValueError, r"v's head dimension"),
    (attend, {"k": tensor(2, 7, 2, 16, dtype=half)}, TypeError, r"k must have q's dtype torch.float32, got float16"),
    (attend, {"q": tensor(2, 5, 4, 16, dtype=torch.int32)}, TypeError, r"q must be floating point, got int32"),
    (attend, {"v": tensor(2, 7, 2, 8).to("meta")}, ValueError, r"v must be on q's device cpu, got .* on meta"),
    (attend, {"window_size": (-2, 0)}, ValueError, r"window_size's left must be at least 0, or -1 .*got -2"),
    (attend, {"window_size": (0, -5)}, ValueError, r"window_size's right .*got -5"),
    (attend, {"window_size": (0.5, 0)}, TypeError, r"window_size's left must be an int, got 0.5"),
    (attend, {"window_size": 3}, ValueError, r"window_size must be a pair \(left, right\), got 3"),
    (attend, {"window_size": (1, 2, 3)}, ValueError, r"window_size must be a pair"),
    (attend, {"softmax_scale": NAN}, ValueError, r"softmax_scale must be finite, got nan"),
    (attend, {"softmax_scale": INF}, ValueError, r"softmax_scale must be finite, got inf"),
    (attend, {"softmax_scale": "1"}, TypeError, r"softmax_scale must be a number, got str"),
    (attend, {"softmax_scale": torch.ones(())}, TypeError, r"softmax_scale must be a number, got Tensor"),
    (attend, {"softcap": -1.0}, ValueError, r"softcap must be above 0, or 0 for none, got -1.0"),
    (attend, {"softcap": NAN}, ValueError, r"softcap must be finite"),
    (attend, {"causal_alignment": "left"}, ValueError, r"'bottom_right' or 'top_left', got 'left'"),
    (
        attend,
        {"key_mask": tensor(2, 6) > 0},
        ValueError,
        r"key_mask must be \(batch, seqlen_k\) = \(2, 7\), got \(2, 6\)",
    ),
    (attend, {"key_mask": tensor(2, 5, 7) > 0}, ValueError, r"key_mask must be \(batch, seqlen_k\)"),
    (attend, {"key_mask": tensor(2, 7)}, TypeError, r"key_mask must be bool, got float32"),
    (attend, {"key_mask": True}, TypeError, r"key_mask must be a torch.Tensor, got bool"),
    (attend, {"key_mask": (tensor(2, 7) > 0).to("meta")}, ValueError, r"key_mask must be on q's device"),
    (attend, {"attn_bias": tensor(5, 6)}, ValueError, r"attn_bias must be broadcastable to .*\(2, 4, 5, 7\), got"),
    (attend, {"attn_bias": tensor(1, 2, 4, 5, 7)}, ValueError, r"attn_bias must be broadcastable"),
    (attend, {"attn_bias": tensor(5, 7) > 0}, TypeError, r"bool mask \(5, 7\): .*key_mask.*window_size.*attn_bias"),
    (attend, {"attn_bias": tensor(5, 7, dtype=half)}, TypeError, r"attn_bias must be float32, got float16"),
    (attend, {"attn_mask": tensor(5, 7) > 0}, TypeError, r"'attn_mask': .*key_mask.*window_size.*attn_bias"),
    (attend, {"is_causal": True}, TypeError, r"'is_causal': use causal=True"),
    (attend, {"scale": 0.1}, TypeError, r"'scale': use softmax_scale="),
    (attend, {"enable_gqa": True}, TypeError, r"'enable_gqa': nothing is needed"),
    (attend, {"retrun_lse": True}, TypeError, r"'retrun_lse': did you mean return_lse="),
    (attend, {"alibi_slopes": tensor(3)}, ValueError, r"alibi_slopes must be \(nheads_q,\) = \(4,\) or"),
    (attend, {"alibi_slopes": tensor(4, dtype=half)}, TypeError, r"alibi_slopes must be float32"),
    (attend, {"alibi_slopes": tensor(4).requires_grad_()}, ValueError, r"alibi_slopes has requires_grad=True"),
    (attend, {"attn_sink": tensor(2)}, ValueError, r"attn_sink must be \(nheads_q,\) = \(4,\), got \(2,\)"),
    (attend, {"dropout_p": 1.5}, ValueError, r"dropout_p must be between 0 and 1, got 1.5"),
    (attend, {"dropout_p": NAN}, ValueError, r"dropout_p must be finite"),
    (attend, {"dropout_p": 0.1, "rng_state": tensor(2)}, TypeError, r"rng_state must be int64"),
    (
        attend,
        {"dropout_p": 0.1, "rng_state": torch.zeros(2).long(), "generator": torch.Generator()},
        ValueError,
        r"generator or rng_state, not both",
    ),
    (attend, {"backend": "cuda"}, ValueError, r"backend='cuda' is unknown to attention forward: its backends are cpu"),
    (decode, {"q": tensor(3, 1, 4, 16)}, ValueError, r"k_cache must have q's batch size 3"),
    (decode, {"v": tensor(2, 6, 2, 8)}, ValueError, r"v_cache must have k_cache's sizes"),
    (
        decode,
        {"k": tensor(2, 7, 2, 16, dtype=torch.int8)},
        TypeError,
        r"a quantised cache needs k_descale and v_descale",
    ),
    (decode, {"cache_seqlens": int32(7, 8)}, ValueError, r"cache_seqlens\[1\] is 8, but the cache holds 0 to 7 keys"),
    (decode, {"cache_seqlens": int32(-1, 3)}, ValueError, r"cache_seqlens\[0\] is -1"),
    (decode, {"cache_seqlens": int32(1, 2, 3)}, ValueError, r"cache_seqlens must be \(batch,\) = \(2,\), got \(3,\)"),
    (decode, {"cache_seqlens": torch.tensor([1, 2])}, TypeError, r"cache_seqlens must be int32, got int64"),
    (decode, {"cache_seqlens": [1, 2]}, TypeError, r"cache_seqlens must be a torch.Tensor, got list"),
    (decode, {"page_table": int32(0, 1).view(2, 1)}, ValueError, r"cache_seqlens is needed with page_table"),
    (
        decode,
        {"page_table": int32(0, 9).view(2, 1), "cache_seqlens": int32(3, 3), "backend": "reference"},
        ValueError,
        r"page_table\[1, 0\] is 9, but the cache has 2 pages",
    ),
    (
        decode,
        {"page_table": int32(0, 1, 0, -1).view(2, 2), "cache_seqlens": int32(3, 8)},
        ValueError,
        r"page_table\[1, 1\] is -1, but the cache has 2 pages",
    ),
    (
        decode,
        {"page_table": int32(0, 1).view(2, 1), "cache_seqlens": int32(3, 8)},
        ValueError,
        r"cache_seqlens\[1\] is 8, but the cache holds 0 to 7 keys",
    ),
    (decode, {"num_splits": 0}, ValueError, r"num_splits must be an int of at least 1"),
    (attend, {"causal": 1}, TypeError, r"causal must be True or False, got 1"),
    (decode, {"causal": "no"}, TypeError, r"causal must be True or False, got 'no'"),
    (attend, {"deterministic": "yes"}, TypeError, r"deterministic must be True or False or None.*got 'yes'"),
    (attend, {"rng_state": tensor(2)}, TypeError, r"rng_state must be int64"),
    (attend, {"rng_state": torch.zeros(3).long()}, ValueError, r"rng_state must be \(2,\)"),
    (attend, {"generator": 3}, TypeError, r"generator must be a torch.Generator, got int"),
    (attend, {"q": tensor(2, 5, 4, 16).to_sparse()}, TypeError, r"q must be a dense, strided .* layout sparse_coo"),
    (attend, {"v": tensor(2, 7, 2, 8).to_sparse()}, TypeError, r"v must be a dense, strided"),
    (attend, {"key_mask": (tensor(2, 7) > 0).to_sparse()}, TypeError, r"key_mask must be a dense, strided"),
    (decode, {"k": tensor(2, 7, 2, 16).to_sparse()}, TypeError, r"k_cache must be a dense, strided"),
    (decode, {"cache_seqlens": int32(3, 3).to_sparse()}, TypeError, r"cache_seqlens must be a dense, strided"),
    (decode, _INT4 | {"k_scale_shift": _PAIRS}, ValueError, r"v_scale_shift is needed with the other one"),
    (decode, _INT4, TypeError, r"k_cache must have q's dtype .*an int4 cache needs k_scale_shift and v_scale_shift"),
    (
        decode,
        _INT4 | _BOTH | {"k": tensor(2, 7, 2, 4, dtype=torch.uint8)},
        ValueError,
        r"q's head_dim 16, two features",
    ),
    (decode, _BOTH, TypeError, r"k_cache must be uint8 with k_scale_shift and v_scale_shift, got float32"),
    (decode, _INT4 | _BOTH | {"k_scale_shift": _PAIRS.float()}, TypeError, r"k_scale_shift must be float16"),
    (decode, _INT4 | _BOTH | {"v_scale_shift": tensor(2, 7, 2, 3, 2, dtype=half)}, ValueError, r"dividing its 4 bytes"),
    (
        decode,
        _INT4 | _BOTH | {"k_descale": tensor(2)},
        ValueError,
        r"k_scale_shift and v_scale_shift \(int4\), not both",
    ),
    (decode, {"block_table": None}, TypeError, r"'block_table': use page_table="),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{next(iter(case[1]))}")
def test_message(case: Case) -> None:
    function, arguments, error, message = case
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_mkldnn_tensors_are_named() -> None:
    with pytest.raises(TypeError, match=r"k must be a dense, strided tensor, got layout _mkldnn"):
        attend(k=tensor(2, 7, 2, 16).to_mkldnn())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_named() -> None:
    nested = torch.nested.nested_tensor([tensor(5, 4, 16), tensor(3, 4, 16)])
    with pytest.raises(TypeError, match=r"q must be a dense, strided tensor, got a nested tensor"):
        attend(q=nested)


def test_explain_says_what_the_call_says() -> None:
    q = tensor(1, 2, 1, 8)
    with pytest.raises(
        TypeError, match=r"explain\('attention', ...\): missing a required argument: 'v'; .*onepass.att"
    ):
        onepass.explain("attention", q, q)
    with pytest.raises(TypeError, match=r"k must be a dense, strided"):
        onepass.explain("attention", q, q.to_sparse(), q)


@pytest.mark.parametrize("size", [2**62, 2**62 + 1, 2**70])
def test_sizes_beyond_every_length_are_no_limit(size: int) -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 4, 16)
    assert torch.equal(attend(q, k, k, window_size=(size, size)), attend(q, k, k))
    assert torch.equal(attend(q, k, k, window_size=(size, 0)), attend(q, k, k, causal=True))
    assert torch.equal(decode(q[:, :1], k, k, window_size=(size, size)), decode(q[:, :1], k, k))
    torch.testing.assert_close(decode(q[:, :1], k, k, num_splits=size), decode(q[:, :1], k, k))


def test_the_valid_call_is_valid() -> None:
    assert attend().shape == (2, 5, 4, 8)
    assert decode().shape == (2, 1, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((tensor(3, 2, 5, 4), tensor(3, 2, 4, 5)), ValueError, r"outs must be stacked|lses must be"),
        ((tensor(3, 2, 5, 4, 8), tensor(3, 2, 5, 4)), ValueError, r"lses must be \(n, batch, nheads_q, seqlen_q\)"),
        ((tensor(3, 2, 5, 4, 8, dtype=half), tensor(3, 2, 4, 5, dtype=half)), TypeError, r"lses must be float32"),
        ((tensor(0, 2, 5, 4, 8), tensor(0, 2, 4, 5)), ValueError, r"at least one part"),
        ((tensor(5), tensor(5)), ValueError, r"outs must be stacked results"),
        (([], []), TypeError, r"outs must be a torch.Tensor, got list"),
        ((None, None), TypeError, r"merge_attention needs outs and lses"),
    ],
)
def test_merge_message(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        onepass.merge_attention(*arguments)


def test_raw_operations_check_as_well() -> None:
    """Memory safety does not rest on api.py."""
    options = (None, None, None, None, None, 1.0, -1, -1, True, 0.0, 0.0, False, "")
    with pytest.raises(ValueError, match="v must have k's sizes"):
        torch.ops.onepass.attention_fwd(tensor(2, 5, 4, 16), tensor(2, 7, 2, 16), tensor(2, 6, 2, 8), *options)
    q = tensor(2, 5, 4, 16)
    needs = (True, True, False, False)
    with pytest.raises(ValueError, match=r"lse must be torch.float32 \(2, 4, 5\)"):
        torch.ops.onepass.attention_bwd(q, None, q, q, q, q, tensor(2, 4, 4), *options[:-1], *needs, "")
    with pytest.raises(ValueError, match=r"do must be torch.float32 \(2, 5, 4, 16\)"):
        torch.ops.onepass.attention_bwd(
            tensor(2, 4, 4, 16), None, q, q, q, q, tensor(2, 4, 5), *options[:-1], *needs, ""
        )
    with pytest.raises(ValueError, match="cache_seqlens"):
        torch.ops.onepass.attention_decode(q, q, q, int32(9, 9), *(None,) * 7, 1.0, -1, 0, 0.0, 0, True, "")


def test_what_the_cpu_kernels_refuse() -> None:
    big = tensor(1, 3, 1, 300)
    with pytest.raises(
        onepass.UnsupportedError, match=r"cpu: head_dim 300[\s\S]*reference: used only when asked for by name"
    ):
        onepass.attention(big, big, big)
    with pytest.raises(onepass.UnsupportedError, match="head_dim 300"):
        onepass.attention(big, big, big, backend="cpu")
    onepass.attention(big, big, big, backend="reference")


def test_refused_dtypes_and_sizes() -> None:
    big = tensor(1, 3, 1, 300)
    with pytest.raises(onepass.UnsupportedError, match="head_dim 300 is above 256"):
        onepass.attention(big, big, big)
    with pytest.raises(onepass.UnsupportedError, match="dtype float64"):
        onepass.attention(big.double(), big.double(), big.double())


def test_backward_refusals_come_with_the_forward_of_another_backend() -> None:
    """use_backend travels into backward, so nothing there falls back either."""
    q = tensor(1, 3, 1, 300).requires_grad_()
    out = onepass.attention(q, q, q, backend="reference")
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(gradient.isfinite(), torch.ones_like(gradient, dtype=torch.bool))
