"""Attention without options on the CPU: forward, forward + backward, decode, growth with length, call overhead.

Providers: onepass-cpu, PyTorch's scaled_dot_product_attention (sdpa) and softmax(q k^T) v written in PyTorch (naive).
onepass reads (batch, seqlen, nheads, head_dim), the peers (batch, nheads, seqlen, head_dim); each gets its own
contiguous layout of the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

import onepass
from onepass.bench import peers
from onepass.bench.registry import Case, Group, Prepared
from onepass.testing import numerics

Shape = tuple[int, int, int, int]  # batch, heads, seqlen, head_dim

SHAPES: tuple[Shape, ...] = (
    (1, 8, 1024, 64),
    (1, 8, 4096, 64),
    (1, 8, 2048, 128),
    (4, 12, 1024, 64),
    (1, 4, 2048, 32),
    (1, 8, 128, 32),
    (1, 8, 256, 32),
    (1, 8, 1024, 32),
    (1, 8, 2048, 32),
    (1, 8, 1000, 80),
)
QUICK_SHAPES = {(1, 8, 1024, 64), (1, 8, 256, 32), (1, 8, 1000, 80)}
ROOFLINE_SHAPE: Shape = (1, 8, 4096, 64)
BACKWARD_FLOPS = 2.5  # five matrix products where the forward has two
NAIVE_SEQLEN_LIMIT = 4096  # beyond it the scores alone would fill the memory of small machines
CHECKED_PAIRS = 1 << 24  # (query, key) pairs of a case that are compared with fp64


def score_flops(shape: Shape, causal: bool) -> float:
    """Flops of the two matrix products over the (query, key) pairs that the mask lets through."""
    batch, heads, seqlen, head_dim = shape
    pairs = seqlen * (seqlen + 1) / 2 if causal else seqlen * seqlen
    return 4.0 * batch * heads * pairs * head_dim


def random_inputs(shape: Shape, dtype: torch.dtype, count: int) -> list[Tensor]:
    """`count` random normal tensors (batch, seqlen, heads, head_dim)."""
    batch, heads, seqlen, head_dim = shape
    return [torch.randn(batch, seqlen, heads, head_dim).to(dtype) for _ in range(count)]


def peer_layout(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) -> (batch, heads, seqlen, head_dim), contiguous."""
    return x.detach().transpose(1, 2).contiguous()


def hidden_keys(seqlen: int, causal: bool) -> Tensor | None:
    """The causal mask as the naive peer wants it: True above the diagonal."""
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1) if causal else None


def as_batch(x: Tensor, count: int) -> Tensor:
    """Heads of (batch, seqlen, heads, head_dim), evenly chosen, as (count, seqlen, 1, head_dim): what is checked."""
    heads = x.transpose(1, 2).flatten(0, 1)
    return heads[torch.linspace(0, len(heads) - 1, min(count, len(heads))).long()].unsqueeze(2)


def forward_errors(
    providers: Mapping[str, Callable[[], Tensor]], inputs: list[Tensor], causal: bool
) -> dict[str, float]:
    """Each provider's error on the last queries of the heads, in budgets; peers' outputs are in their own layout."""
    outputs = {name: call() for name, call in providers.items()}
    ours = next(iter(outputs))
    batch, seqlen, heads, _ = inputs[0].shape
    count = batch * heads
    queries = min(seqlen, CHECKED_PAIRS // (count * seqlen))
    q, k, v = (as_batch(x, count) for x in inputs)
    q = q[:, -queries:]  # causal masks are aligned to the bottom right, so the last queries alone see the same keys

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return onepass.attention(q, k, v, causal=causal, backend="reference")

    exact, rounded = attend(q.double(), k.double(), v.double()), attend(q, k, v)
    found = {}
    for name, out in outputs.items():
        seen = as_batch(out if name == ours else out.transpose(1, 2), count)[:, -queries:]
        found[name] = numerics.error_in_budgets(seen, exact, rounded)
    return found


def forward_providers(inputs: list[Tensor], causal: bool) -> dict[str, Callable[[], Tensor]]:
    q, k, v = inputs
    peer_q, peer_k, peer_v = map(peer_layout, inputs)
    providers: dict[str, Callable[[], Tensor]] = {
        "onepass-cpu": partial(onepass.attention, q, k, v, causal=causal, backend="cpu"),
        "sdpa": partial(peers.sdpa, peer_q, peer_k, peer_v, causal),
    }
    if q.shape[1] <= NAIVE_SEQLEN_LIMIT:
        providers["naive"] = partial(peers.naive_attention, peer_q, peer_k, peer_v, hidden_keys(q.shape[1], causal))
    return providers


def prepare_forward(shape: Shape, dtype: torch.dtype, causal: bool) -> Prepared:
    inputs = random_inputs(shape, dtype, 3)
    providers = forward_providers(inputs, causal)
    return Prepared(providers, partial(forward_errors, providers, inputs, causal))


def gradients(attend: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """One forward and backward: (dq, dk, dv)."""
    return torch.autograd.grad(attend(*inputs), inputs, do)


def backward_errors(
    providers: Mapping[str, Callable[[], tuple[Tensor, ...]]], inputs: list[Tensor], do: Tensor, causal: bool
) -> dict[str, float]:
    """Each provider's worst error over dq, dk and dv of some heads, in budgets."""
    found = {}
    attend = partial(onepass.attention, causal=causal, backend="reference")
    count = max(2, CHECKED_PAIRS // do.shape[1] ** 2)
    leaves = [as_batch(x.detach(), count) for x in inputs]

    def reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return gradients(attend, [x.to(dtype).requires_grad_() for x in leaves], as_batch(do, count).to(dtype))

    exact, rounded = reference(torch.float64), reference(do.dtype)
    for name, call in providers.items():
        grads = [as_batch(g if name == "onepass-cpu" else g.transpose(1, 2), count) for g in call()]
        found[name] = max(numerics.error_in_budgets(*three) for three in zip(grads, exact, rounded, strict=True))
    return found


def prepare_forward_backward(shape: Shape, dtype: torch.dtype, causal: bool) -> Prepared:
    *inputs, do = random_inputs(shape, dtype, 4)
    peer_inputs = [peer_layout(x).requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    hidden = hidden_keys(shape[2], causal)
    providers: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "onepass-cpu": partial(gradients, partial(onepass.attention, causal=causal, backend="cpu"), inputs, do),
        "sdpa": partial(gradients, partial(peers.sdpa, causal=causal), peer_inputs, peer_layout(do)),
        "naive": partial(gradients, partial(peers.naive_attention, hidden=hidden), peer_inputs, peer_layout(do)),
    }
    return Prepared(providers, partial(backward_errors, providers, inputs, do, causal), grad=True)


def grid(dtype: torch.dtype, backward: bool, bars: Mapping[str, float], roofline_bar: float = 0.0) -> tuple[Case, ...]:
    """Every shape, causal and not."""
    prepare = prepare_forward_backward if backward else prepare_forward
    tensors = 9 if backward else 4  # q, k, v, out; and do, dq, dk, dv, with out read again
    cases = []
    for shape in SHAPES:
        for causal in (False, True):
            batch, heads, seqlen, head_dim = shape
            own_bars = dict(bars)
            if roofline_bar and shape == ROOFLINE_SHAPE and not causal:
                own_bars["percent_of_peak"] = roofline_bar
            cases.append(
                Case(
                    name=f"{batch},{heads},{seqlen},{head_dim}{' causal' if causal else ''}",
                    params={"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim, "causal": causal},
                    dtype=str(dtype).removeprefix("torch."),
                    prepare=partial(prepare, shape, dtype, causal),
                    flops=score_flops(shape, causal) * (1.0 + BACKWARD_FLOPS * backward),
                    min_bytes=float(tensors * batch * heads * seqlen * head_dim * dtype.itemsize),
                    bars=own_bars,
                    quick=shape in QUICK_SHAPES,
                )
            )
    return tuple(cases)


# Decode: one query, 32 query heads on 8 KV heads, against both ways in which PyTorch's users write it.
DECODE_HEADS_Q, DECODE_HEADS_KV, DECODE_HEAD_DIM = 32, 8, 128


def prepare_decode(seqlen: int, dtype: torch.dtype) -> Prepared:
    q = torch.randn(1, 1, DECODE_HEADS_Q, DECODE_HEAD_DIM).to(dtype)
    k, v = random_inputs((1, DECODE_HEADS_KV, seqlen, DECODE_HEAD_DIM), dtype, 2)
    peer_inputs = [peer_layout(x) for x in (q, k, v)]
    lengths = torch.tensor([seqlen], dtype=torch.int32)
    providers: dict[str, Callable[[], Tensor]] = {
        "onepass-cpu": partial(onepass.attention_decode, q, k, v, cache_seqlens=lengths, backend="cpu"),
        "sdpa enable_gqa": partial(peers.sdpa_decode_gqa, *peer_inputs),
        "sdpa folded heads": partial(peers.sdpa_decode_folded, *peer_inputs),
    }

    def errors() -> dict[str, float]:
        exact = onepass.attention(q.double(), k.double(), v.double(), backend="reference")
        rounded = onepass.attention(q, k, v, backend="reference")
        return {
            name: numerics.error_in_budgets(call().reshape(q.shape), exact, rounded) for name, call in providers.items()
        }

    return Prepared(providers, errors)


def decode_case(seqlen: int) -> Case:
    pairs = DECODE_HEADS_Q * seqlen
    return Case(
        name=f"{seqlen} keys",
        params={
            "heads_q": DECODE_HEADS_Q,
            "heads_kv": DECODE_HEADS_KV,
            "head_dim": DECODE_HEAD_DIM,
            "seqlen_k": seqlen,
        },
        dtype="bfloat16",
        prepare=partial(prepare_decode, seqlen, torch.bfloat16),
        flops=4.0 * pairs * DECODE_HEAD_DIM,
        min_bytes=2.0 * 2 * DECODE_HEADS_KV * seqlen * DECODE_HEAD_DIM,
        bars={"ratio": 3.0},
        quick=seqlen == 4096,
    )


def scaling_case(seqlen: int) -> Case:
    shape = (1, 2, seqlen, 64)
    return Case(
        name=f"N = {seqlen}",
        params={"batch": 1, "heads": 2, "seqlen": seqlen, "head_dim": 64, "causal": False},
        dtype="float32",
        prepare=partial(prepare_forward, shape, torch.float32, False),
        flops=score_flops(shape, False),
        min_bytes=4.0 * 4 * 2 * seqlen * 64,
        memory=True,
        quick=seqlen <= 2048,
    )


def prepare_call() -> Prepared:
    """The smallest call: what is timed is the way to the kernel."""
    inputs = random_inputs((1, 1, 16, 32), torch.float32, 3)
    q, k, v = inputs
    peer_q, peer_k, peer_v = map(peer_layout, inputs)
    attention, sdpa = onepass.attention, torch.nn.functional.scaled_dot_product_attention
    providers = {"onepass": lambda: attention(q, k, v), "sdpa": lambda: sdpa(peer_q, peer_k, peer_v)}
    return Prepared(providers, partial(forward_errors, providers, inputs, False))


CALL = Case(
    name="one call",
    params={"batch": 1, "heads": 1, "seqlen": 16, "head_dim": 32, "causal": False},
    dtype="float32",
    prepare=prepare_call,
    bars={"ratio": 1 / 1.3, "seconds": 14e-6},
    quick=True,
)
FP32, BF16 = torch.float32, torch.bfloat16

GROUPS = (
    Group("forward-fp32", "Forward, fp32", grid(FP32, False, {"ratio": 2.0, "error_to_sdpa": 2.0}, 80.0), mean_bar=2.5),
    Group("forward-bf16", "Forward, bf16", grid(BF16, False, {"ratio": 1.5}, 70.0), mean_bar=3.3),
    Group(
        "forward-backward-fp32",
        "Forward + backward, fp32",
        grid(FP32, True, {"ratio": 2.0, "error_to_sdpa": 2.0}),
        mean_bar=2.6,
    ),
    Group("forward-backward-bf16", "Forward + backward, bf16", grid(BF16, True, {"ratio": 1.4}), mean_bar=2.5),
    Group("decode", "Decode, bf16, 32 query heads on 8 KV heads", tuple(map(decode_case, (4096, 16384))), unit="us"),
    Group(
        "forward-fp32-avx2",
        "Forward, fp32, onepass held to AVX2",
        grid(FP32, False, {"ratio": 1.1}),
        mean_bar=1.3,
        settings={"ONEPASS_CPU_ISA": "avx2"},
    ),
    Group(
        "scaling",
        "How time and memory grow with the length, fp32, 2 heads of 64",
        tuple(map(scaling_case, (1024, 2048, 4096, 8192, 16384))),
        axis="seqlen",
    ),
    Group("call", "Call overhead: one head, N 16, D 32, under no_grad", (CALL,), unit="us"),
)
