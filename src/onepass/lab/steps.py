"""The four steps as functions: csrc/lab_{naive,blocked,fused,flash}.cpp, each a page that shows one idea."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from onepass.core import checks, cpu_library

# In the order in which they are learned.
STEPS = ("naive", "blocked", "fused", "flash")

# block_q, block_k when none are given. Blocked: a tile of K in the first-level cache. Fused: the rows whose loads are
# shared. Flash: three vectors of queries with AVX-512, and a tile of scores in a part of the first-level cache.
DEFAULT_BLOCKS = {"naive": (1, 1), "blocked": (64, 64), "fused": (4, 1), "flash": (48, 64)}

# LabAttentionArgs of csrc/abi.h.
_ARGUMENTS = struct.Struct("=11q d 5q 5q 5q 5q q")


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: str = "flash",
    block_q: int | None = None,
    block_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v by one of the four steps. Forward only; `onepass.attention` is the one for every day.

    q (batch, seqlen_q, nheads_q, head_dim), k (batch, seqlen_k, nheads_kv, head_dim), v (batch, seqlen_k, nheads_kv,
    head_dim_v): fp32 on the CPU, of any batch, sequence and head strides (they are read in place), with the features
    of one head next to one another. nheads_kv divides nheads_q; query head h uses KV head
    h // (nheads_q // nheads_kv).

    step: "naive" (the whole matrix of scores, three loops), "blocked" (the same in tiles), "fused" (a few rows of
        scores a thread) or "flash" (tiles with an online softmax).
    block_q, block_k: queries and keys of a tile, of any size from 1; None: the step's own. For "fused" block_q is the
        number of rows that a thread takes together (1: row by row); "naive" has no tiles and ignores both.
    causal: query i sees keys j <= i + seqlen_k - seqlen_q (bottom-right corner).
    softmax_scale: any finite number; None: head_dim ** -0.5.

    Returns a new contiguous (batch, seqlen_q, nheads_q, head_dim_v). Lengths of 0 are valid; a query that sees no key
    gives 0. The maximum of a row is subtracted before exp, so scores of any size are safe. Sums are fp32, and the
    bits do not depend on the number of threads, which is torch.get_num_threads().

    Raises ValueError when shapes or options contradict, a gradient is asked for or a layout cannot be read in place;
    TypeError for another dtype; MemoryError when the scores do not fit.
    """
    return _run(q, k, v, step, block_q, block_k, causal, softmax_scale, 0)


def attention_step_and_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: str = "flash",
    block_q: int | None = None,
    block_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, int]:
    """`attention_step`, and the bytes of working memory that it took beyond its inputs and its output."""
    working_memory = ctypes.c_int64()
    out = _run(q, k, v, step, block_q, block_k, causal, softmax_scale, ctypes.addressof(working_memory))
    return out, working_memory.value


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: str,
    block_q: int | None,
    block_k: int | None,
    causal: bool,
    softmax_scale: float | None,
    working_memory: int,
) -> Tensor:
    _check_step(step, block_q, block_k)
    if not _are_valid(q, k, v):
        _check_tensors(q, k, v)
    batch, seqlen_q, nheads_q, head_dim = q.shape
    _, seqlen_k, nheads_kv, head_dim_v = v.shape
    default_q, default_k = DEFAULT_BLOCKS[step]
    scale = head_dim**-0.5 if softmax_scale is None else checks.finite_float("softmax_scale", softmax_scale)
    out = torch.empty((batch, seqlen_q, nheads_q, head_dim_v), dtype=torch.float32, device="cpu")
    if out.numel() == 0 or seqlen_k == 0:
        return out.zero_()
    arguments = _ARGUMENTS.pack(
        torch.get_num_threads(),
        batch,
        seqlen_q,
        seqlen_k,
        nheads_q,
        nheads_kv,
        head_dim,
        head_dim_v,
        bool(causal),
        default_q if block_q is None else block_q,
        default_k if block_k is None else block_k,
        scale,
        *_tensor4(q),
        *_tensor4(k),
        *_tensor4(v),
        *_tensor4(out),
        working_memory,
    )
    cpu_library.kernel("lab_" + step)(arguments)
    return out


def _tensor4(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Tensor4 of csrc/abi.h: data, then the strides of batch, sequence, head and feature."""
    return (tensor.data_ptr(), *tensor.stride())  # type: ignore[return-value]


def _check_step(step: str, block_q: int | None, block_k: int | None) -> None:
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(map(repr, STEPS))}, got {step!r}")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block is None:
            continue
        if not isinstance(block, int) or isinstance(block, bool):
            raise TypeError(f"{name} must be an int or None, got {type(block).__name__}")
        if not 1 <= block < 2**62:
            raise ValueError(f"{name} must be at least 1 (or None for the step's own), got {block}")


def _are_valid(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True only where `_check_tensors` has nothing to say; quick, as a single token's attention takes microseconds."""
    if not type(q) is type(k) is type(v) is Tensor:
        return False
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return False
    return (
        q.dtype is k.dtype is v.dtype is torch.float32
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3] > 0
        and k_shape[:3] == v_shape[:3]
        and k_shape[2] > 0
        and q_shape[2] % k_shape[2] == 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and not (q.is_neg() or k.is_neg() or v.is_neg())
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises what is wrong with the tensors, in words."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_kind(name, tensor)
        _check_layout(name, tensor)
    batch, _, nheads_q, head_dim = q.shape
    seqlen_k, nheads_kv = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"k must be (batch, seqlen_k, nheads_kv, head_dim) = ({batch}, seqlen_k, nheads_kv, {head_dim}) like q "
            f"{checks.shape(q)}, got {checks.shape(k)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "v must be (batch, seqlen_k, nheads_kv, head_dim_v) = "
            f"({batch}, {seqlen_k}, {nheads_kv}, head_dim_v) like k, got {checks.shape(v)}"
        )
    if head_dim == 0:
        raise ValueError(f"head_dim must be at least 1, got q {checks.shape(q)}")
    if nheads_kv == 0 or nheads_q % nheads_kv != 0:
        raise ValueError(f"nheads_q must be a multiple of nheads_kv, got {nheads_q} and {nheads_kv}")


def _check_kind(name: str, tensor: Tensor) -> None:
    checks.require_tensor(name, tensor)
    if type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter):
        raise TypeError(f"{name} must be a plain tensor whose memory can be read, got a {type(tensor).__name__}")
    came = checks.describe(tensor)
    if tensor.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {came}: the steps are fp32; onepass.attention takes more")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {came}: onepass.attention runs on other devices")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, and the steps are forward only: use onepass.attention, or run them under "
            "torch.no_grad()"
        )


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be (batch, seqlen, nheads, head_dim), got {checks.shape(tensor)}")
    if tensor.stride(3) != 1 and tensor.shape[3] > 1:
        raise ValueError(
            f"{name} must have the features of a head next to one another (stride 1 in the last dimension), got "
            f"strides {tensor.stride()}: pass {name}.contiguous(), or use onepass.attention, which reads any strides"
        )
    if tensor.is_neg():
        raise ValueError(f"{name} is a lazily negated view: pass {name}.resolve_neg()")
