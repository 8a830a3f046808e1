"""Attention's tensors by TMA, for which calls of these lengths would be too short."""

from typing import Any

import pytest
import torch

from onepass.core import replay
from onepass.ops.attention.inputs import AttentionCase
from onepass.ops.attention.inputs_varlen import VarlenCase
from onepass.testing import numerics

pytest.importorskip("triton", reason="Triton is not installed")

from onepass.ops.attention.triton import problem

pytestmark = pytest.mark.gpu

WHOLE = {"seqlen_q": 256, "seqlen_k": 256}
ODD = {"seqlen_q": 203, "seqlen_k": 328}  # rows of a bias begin at multiples of 16 bytes
CASES = [
    AttentionCase("whole blocks", **WHOLE),
    AttentionCase("whole blocks, causal", **WHOLE, causal=True, head_dim=64),
    AttentionCase("odd lengths", **ODD, head_dim=128),
    AttentionCase("odd lengths, causal, grouped heads", **ODD, causal=True, nheads_q=4),
    AttentionCase("window", **ODD, window_size=(100, 30)),
    AttentionCase("ALiBi, causal", **ODD, alibi=True, causal=True),
    AttentionCase("softcap and sink", **ODD, softcap=15.0, sink=True),
    AttentionCase("masked keys", **ODD, key_mask=True),
    AttentionCase("dropout", **ODD, dropout_p=0.3),
    AttentionCase("heads first", **ODD, layout="bhsd"),
    AttentionCase("head_dim 128, softcap, grouped heads", **ODD, head_dim=128, softcap=15.0, nheads_q=4),
    AttentionCase("head_dim 128, ALiBi, causal", **ODD, head_dim=128, alibi=True, causal=True),
    AttentionCase("head_dim 128, dropout", **ODD, head_dim=128, dropout_p=0.3),
    AttentionCase("head_dim 128, window, grouped heads", **ODD, head_dim=128, window_size=(100, 0), nheads_q=4),
    AttentionCase("head_dim 128, bias, grouped heads", **ODD, head_dim=128, bias=(0, 0, 0, 0), nheads_q=4),
    AttentionCase("head_dim 256, softcap", **ODD, head_dim=256, softcap=15.0),
    AttentionCase("bias, whole blocks", **WHOLE, bias=(0, 0, 0, 0)),
    AttentionCase("bias, whole blocks, head_dim 128", **WHOLE, bias=(0, 0, 0, 0), head_dim=128),
    AttentionCase("bias, odd lengths", **ODD, bias=(0, 0, 0, 0)),
    AttentionCase("bias that hides, odd lengths", **ODD, bias=(0, 0, 0, 0), bias_hides=True),
    AttentionCase("bias of heads, grouped", **ODD, bias=(1, 0, 0, 0), nheads_q=4, causal=True),
    AttentionCase("bias of batches", **ODD, bias=(0, 1, 0, 0), head_dim=64),
    AttentionCase("bias of keys", **ODD, bias=(0, 0, 1, 0)),
    AttentionCase("bias of queries", **ODD, bias=(0, 0, 0, 1)),
    AttentionCase("bias, rows not aligned", seqlen_q=150, seqlen_k=201, bias=(0, 0, 0, 0)),
    AttentionCase("bias, few keys", seqlen_q=256, seqlen_k=40, bias=(0, 0, 0, 0)),
    AttentionCase("bias of a head", **ODD, bias=(0, 0, 0, 0), nheads_q=1, nheads_kv=1, layout="bhsd"),
    AttentionCase("bias in fp32", **ODD, bias=(0, 0, 0, 0), bias_fp32=True),
    AttentionCase("bias, long", batch=1, seqlen_q=520, seqlen_k=640, bias=(1, 0, 0, 0), head_dim=128, causal=True),
    AttentionCase("bias and the rest", **ODD, bias=(0, 0, 0, 0), softcap=15.0, alibi=True, dropout_p=0.3, sink=True),
    VarlenCase("packed", (130, 7, 200), (130, 90, 200), head_dim=64),
    VarlenCase("packed, causal, grouped heads", (130, 7, 201), (150, 90, 203), causal=True, nheads_q=4),
    VarlenCase("packed, bias", (130, 7, 200), (136, 90, 200), bias=(0, 0, 0, 0)),
    VarlenCase("packed, bias of heads", (130, 7, 201), (150, 90, 208), bias=(1, 0, 0, 0), causal=True),
]


@pytest.fixture(autouse=True)
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tensors that a test has descriptors of, however short its sequences are."""
    if torch.cuda.get_device_capability() < (9, 0) or torch.version.hip is not None:
        pytest.skip("this GPU has no TMA")
    from triton.tools import tensor_descriptor

    made: list[Any] = []
    ordinary = tensor_descriptor.TensorDescriptor

    def descriptor(base: torch.Tensor, *arguments: Any) -> Any:
        made.append(base)
        return ordinary(base, *arguments)

    monkeypatch.setattr(problem, "TMA_SEQLEN", 1)
    monkeypatch.setattr(tensor_descriptor, "TensorDescriptor", descriptor)
    return made


def _has(descriptors: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return any(x.shape == shape and x.dtype is dtype for x in descriptors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(
    case: Any, dtype: torch.dtype, descriptors: list[Any], generator: torch.Generator
) -> None:
    inputs = case.inputs(dtype, "cuda", generator)
    with replay.paused():
        comparisons = numerics.compare_inputs(case, inputs, "triton")
    numerics.assert_within_budget(comparisons, case=case)
    assert _has(descriptors, tuple(inputs["k"].unsqueeze(0).shape[-4:]), dtype)
    if "head_dim 128" in case.name:  # lse and delta, whose rows are padded to 16 bytes
        assert _has(descriptors, (2, 2, case.nheads_q, -(-case.seqlen_q // 4) * 4), torch.float32)
    if case.bias == (0, 0, 0, 0) and inputs["attn_bias"].dtype is dtype and inputs["attn_bias"].shape[3] % 8 == 0:
        batch, nheads, seqlen_q, seqlen_k = inputs["attn_bias"].shape
        assert _has(descriptors, (batch, seqlen_q, nheads, seqlen_k), dtype)


def test_heads_that_begin_between_multiples_of_16_bytes(descriptors: list[Any], generator: torch.Generator) -> None:
    """TMA does not read from there; the next heads of k and v, and the next queries of the bias, lie so."""
    case = AttentionCase("heads apart", **WHOLE, bias=(1, 0, 0, 0), head_dim=64)
    inputs = case.inputs(torch.bfloat16, "cuda", generator)
    for name in ("k", "v"):
        x = inputs[name]
        inputs[name] = x.new_zeros(*x.shape[:3], 68)[..., :64].copy_(x)
    bias = inputs["attn_bias"]
    inputs["attn_bias"] = bias.new_zeros(1, 256, 2, 260)[..., :256].copy_(bias.transpose(1, 2)).transpose(1, 2)
    with replay.paused():
        numerics.assert_within_budget(numerics.compare_inputs(case, inputs, "triton"), case=case)
