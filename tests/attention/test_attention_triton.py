"""Attention's Triton kernels compiled ahead of time for each target, with a matrix of features."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.core import device, env
from onepass.testing import aot

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="interpreted kernels are not compiled")

_SEQLEN = 1024  # long enough for TMA
_PLAIN: dict[str, Any] = {}
_CAUSAL = {"right": 0}
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"right": 0, "left": 64, "sink": True},
    {"right": 0, "softcap": 5.0},
    {"right": 0, "alibi": True},
    {"right": 0, "p": 0.1},
    {"mask": True},
    {"bias": True},
)
_EVERYTHING = {
    "left": 64,
    "right": 0,
    "softcap": 5.0,
    "alibi": True,
    "bias": True,
    "sink": True,
    "mask": True,
    "p": 0.1,
}


def _tensors(head_dim: int, head_dim_v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = 1, _SEQLEN, 2
    return (
        torch.empty(1, _SEQLEN, 4, head_dim, dtype=dtype),
        torch.empty(*shape, head_dim, dtype=dtype),
        torch.empty(*shape, head_dim_v, dtype=dtype),
    )


def _options(bias: Tensor, mask: Tensor, dtype: torch.dtype, features: dict[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """attn_bias, alibi_slopes, attn_sink, key_mask, rng_state; the rest of the options from softmax_scale on."""
    slopes, sink, rng = torch.empty(4), torch.empty(4, dtype=dtype), torch.empty(2).long()
    tensors = (
        bias if "bias" in features else None,
        slopes if "alibi" in features else None,
        sink if "sink" in features else None,
        mask if "mask" in features else None,
        rng if "p" in features else None,
    )
    numbers = (
        0.1,
        features.get("left", -1),
        features.get("right", -1),
        True,
        features.get("softcap", 0.0),
        features.get("p", 0.0),
        False,
    )
    return tensors, numbers


def _attend(head_dim: int, head_dim_v: int, dtype: torch.dtype, features: dict[str, Any]) -> None:
    from onepass.ops.attention.triton import bwd, fwd

    q, k, v = _tensors(head_dim, head_dim_v, dtype)
    keys_of_bias = 1 if features is _EVERYTHING else _SEQLEN  # the latter come by TMA
    bias, mask = torch.empty(1, 4, _SEQLEN, keys_of_bias, dtype=dtype), torch.empty(1, _SEQLEN, dtype=torch.bool)
    if "unaligned" in features:  # TMA does not read such rows
        bias = torch.empty(1, 4, _SEQLEN, keys_of_bias + 1, dtype=dtype)[..., 1:]
    tensors, numbers = _options(bias, mask, dtype, features)
    out, lse = fwd.forward(q, k, v, *tensors, *numbers)
    needs = True, True, "bias" in features, "sink" in features
    dlse = lse if features is _EVERYTHING else None
    bwd.backward(out, dlse, q, k, v, out, lse, *tensors, *numbers, *needs)


def _attend_packed(head_dim: int, head_dim_v: int, dtype: torch.dtype, features: dict[str, Any]) -> None:
    """With every option, some keys are not used."""
    from onepass.ops.attention.triton import varlen

    q, k, v = (x.squeeze(0) for x in _tensors(head_dim, head_dim_v, dtype))
    lengths = torch.tensor([0, 500, _SEQLEN], dtype=torch.int32)
    used = torch.tensor([400, 500], dtype=torch.int32) if features is _EVERYTHING else None
    sizes = (600, 1) if features is _EVERYTHING else (_SEQLEN, _SEQLEN)
    bias, mask = torch.empty(2, 4, *sizes, dtype=dtype), torch.empty(_SEQLEN, dtype=torch.bool)
    tensors, numbers = _options(bias, mask, dtype, features)
    longest = sizes[0], sizes[0]
    out, lse = varlen.forward(q, k, v, lengths, lengths, used, None, *tensors, *longest, *numbers)
    needs = True, True, "bias" in features, "sink" in features
    varlen.backward(out, None, q, k, v, out, lse, lengths, lengths, used, *tensors, *longest, *numbers, *needs)


def _prefill(head_dim: int, page_size: int, features: dict[str, Any]) -> None:
    from onepass.ops.attention.triton import varlen

    q = torch.empty(_SEQLEN, 4, head_dim, dtype=torch.bfloat16)
    pages = torch.empty(8, page_size, 2, head_dim, dtype=torch.bfloat16)
    lengths, used = torch.tensor([0, _SEQLEN], dtype=torch.int32), torch.tensor([4 * page_size], dtype=torch.int32)
    tensors, numbers = _options(q, q, torch.bfloat16, features)
    table = torch.arange(8, dtype=torch.int32).view(1, 8)
    varlen.forward(q, pages, pages, lengths, None, used, table, *tensors, _SEQLEN, _SEQLEN, *numbers)


def _decode(head_dim: int, paged: bool, stored: torch.dtype = torch.bfloat16) -> None:
    from onepass.ops.attention.triton import decode

    q = torch.empty(1, 1, 4, head_dim, dtype=torch.bfloat16)
    shape = (8, 16, 2, head_dim) if paged else (1, 128, 2, head_dim)
    descale = None if stored is torch.bfloat16 else torch.empty(2)
    cache, lengths = torch.empty(shape, dtype=stored), torch.full((1,), 100, dtype=torch.int32)
    table = torch.zeros(1, 8, dtype=torch.int32) if paged else None
    decode.decode(q, cache, cache, lengths, table, None, None, descale, descale, None, None, 0.1, -1, 0, 0.0, 2, True)


def _decode_with_options(head_dim: int) -> None:
    from onepass.ops.attention.triton import decode

    q, cache = torch.empty(1, 2, 4, head_dim).half(), torch.empty(1, 128, 2, head_dim).half()
    slopes, sink = torch.empty(4), torch.empty(4).half()
    decode.decode(q, cache, cache, None, None, slopes, sink, None, None, None, None, 0.1, 64, 0, 5.0, 2, True)


def _decode_int4(head_dim: int, groups: int, dtype: torch.dtype, page_size: int = 0, seqlen_q: int = 1) -> None:
    from onepass.ops.attention.triton import decode

    q = torch.empty(1, seqlen_q, 4, head_dim, dtype=dtype)
    paged = page_size > 0
    places = (8, page_size, 2) if paged else (1, 128, 2)
    cache, pairs = torch.empty(*places, head_dim // 2, dtype=torch.uint8), torch.empty(*places, groups, 2).half()
    lengths = torch.full((1,), 100, dtype=torch.int32)
    table = torch.zeros(1, 8, dtype=torch.int32) if paged else None
    options = (None, None, None, None, pairs, pairs, 0.1, -1, 0, 0.0, 2, True)
    decode.decode(q, cache, cache, lengths, table, *options)


_WATCHED = ("sm_80", "sm_90")  # where registers must not spill


def _launch() -> None:
    from onepass.ops.attention.triton import merge

    _attend(64, 64, torch.bfloat16, _PLAIN)
    _attend(128, 128, torch.bfloat16, _PLAIN)
    _attend(128, 128, torch.bfloat16, _CAUSAL)
    _attend(192, 128, torch.bfloat16, _PLAIN)
    _attend_packed(128, 128, torch.bfloat16, _CAUSAL)
    _attend_packed(64, 64, torch.bfloat16, _PLAIN)
    _prefill(128, 16, _CAUSAL)
    for paged in (False, True):
        _decode(128, paged)
    _decode(64, True, torch.int8)
    _decode_with_options(64)
    _decode_int4(128, 1, torch.bfloat16)
    _decode_int4(128, 1, torch.bfloat16, 16)
    _prefill(64, 256, {"softcap": 5.0})
    _decode_int4(64, 1, torch.float16, 256)
    _decode_int4(128, 2, torch.bfloat16)
    _decode_int4(128, 1, torch.bfloat16, seqlen_q=9)
    _decode_int4(10, 1, torch.float16)  # an odd number of bytes
    _decode_int4(64, 1, torch.float32)
    _attend(64, 64, torch.float32, _CAUSAL)
    target = device.arch(torch.empty(0))
    if target != "sm_90":
        _attend(40, 40, torch.float16, _EVERYTHING)  # takes as long as ten others
    if target == "sm_100":  # the least shared memory for what needs most
        for features in (_PLAIN, {"bias": True}, {"softcap": 5.0}):
            _attend(256, 256, torch.bfloat16, features)
    if target in _WATCHED:
        for features in _OPTIONS:
            _attend(128, 128, torch.bfloat16, features)
    if target in ("sm_90", "gfx950"):
        _decode(64, False, torch.float8_e4m3fn)
    if target == "sm_90":
        _attend(64, 64, torch.bfloat16, {"p": 1e-10})  # the least threshold, 1, of which Triton makes a constant
        _attend_packed(40, 72, torch.float16, _EVERYTHING)
        _attend(64, 64, torch.bfloat16, {"bias": True})
        for head_dim in (64, 128):
            _attend(head_dim, head_dim, torch.bfloat16, {"bias": True, "unaligned": True})
        _attend(128, 128, torch.bfloat16, {"bias": True, "unaligned": True, "p": 0.1})
        _attend_packed(128, 128, torch.bfloat16, {"bias": True, "right": 0})
    outs, lses = torch.empty(2, 1, 8, 4, 64), torch.empty(2, 1, 4, 8)
    out, lse = merge.merge(outs, lses)
    merge.merge_backward(out, lse, outs, lses, out, lse)


_PRODUCTS = {
    "_fwd_kernel": 2,
    "_keys_bwd_kernel": 4,
    "_queries_bwd_kernel": 3,
    "_bias_bwd_kernel": 2,
    "_decode_kernel": 2,
    "_decode_int4_kernel": 4,
}


def _fault(launch: aot.Launch, target: str, kernel: aot.Compiled) -> str:
    """Products of 16-bit numbers take matrix instructions; what is launched by default does not spill; copies ahead of
    a loop are held back where it does not run.
    """
    if target == "sm_90" and launch.constants.get("TOGETHER") and "cp.async.bulk.prefetch" not in kernel.text:
        return "nothing is prefetched"
    if unconditional := aot.unconditional_copies(kernel.text):
        return f"copies that nothing holds back: {unconditional}"
    wait, load = kernel.text.find("griddepcontrol.wait"), kernel.text.find("ld.global")
    if launch.constants.get("FOLLOWS") and not 0 < wait < load:
        return "memory is read before the wait"
    if launch.name in _PRODUCTS and "PRECISION" in launch.constants:  # merging has a _fwd_kernel too
        floats = launch.arguments[0].dtype is torch.float32
        decodes = launch.name.startswith("_decode")
        wanted = "wgmma" if target == "sm_90" and not decodes else r"wgmma|mma\.sync|tcgen05\.mma|v_mfma"
        tiled = decodes or launch.constants["BLOCK_M"] >= 64
        if not floats and tiled and len(re.findall(wanted, kernel.text)) < _PRODUCTS[launch.name]:
            return f"no matrix instructions {wanted}"
        everything = launch.constants["SOFTCAP"] and launch.constants["ALIBI"]
        if target in _WATCHED and not everything and kernel.local > _spills(launch):
            return f"{kernel.local} bytes of local memory"
    return ""


def _spills(launch: aot.Launch) -> int:
    """Bytes that a thread may spill: none, but in the backward of wide heads, of packed sequences and of options.

    There tiles that spill a little, almost all of it outside the loops, are a sixth to a third faster than the largest
    without (docs/kernels/attention_gpu.md).
    """
    measured = version("triton").startswith("3.6.")
    constants = launch.constants
    if launch.name == "_queries_bwd_kernel" and constants["BLOCK_D"] == 128 and constants["DROPOUT"]:
        return 16
    if launch.name == "_decode_int4_kernel":  # 3.9 spills before and after the loops, nothing in them
        return 0 if measured else 96
    if launch.name != "_keys_bwd_kernel":
        return 0
    if constants["BLOCK_D"] <= 128 and not constants["VARLEN"]:
        options = sum(bool(constants[option]) for option in ("SOFTCAP", "ALIBI", "BIAS", "KEY_MASK", "DROPOUT"))
        if options:
            return 160 if options > 1 else 24 if measured else 136
        return 8 if constants["GROUP"] > 1 and not constants["RIGHT"] else 0
    # Triton 3.9 reads 11 spilled registers in a loop of 702 instructions where 3.6, the measured one, reads 3 of 561.
    return 96 if measured else 160


def test_compiles_for_every_target() -> None:
    aot.assert_every_kernel_compiles("onepass.ops.attention.triton", _launch, _fault)
