"""Runs every C++ kernel on awkward sizes; meant to run inside AddressSanitizer and UBSan (see test_sanitizers.py).

Sizes are not multiples of any tile, tensors are views with odd strides, rows are empty. Outputs are compared with the
reference, so
that a kernel which did nothing would not pass.
"""

import itertools

import torch

import onepass
from onepass import lab
from onepass.bench.peak import fma_peak

DTYPES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
SHAPES = [  # batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v
    (1, 1, 1, 1, 1, 1, 1),
    (2, 17, 33, 4, 2, 33, 33),
    (1, 65, 49, 3, 1, 80, 40),
    (1, 5, 130, 2, 2, 72, 96),
    (1, 131, 7, 2, 1, 256, 256),
    (0, 3, 4, 2, 2, 8, 8),
    (1, 0, 4, 2, 2, 8, 8),
    (1, 4, 0, 2, 2, 8, 8),
]


def compare(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} is not {tuple(expected.shape)}"
    close = torch.isclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    assert close.all(), (
        f"{what}: {(~close).sum()} of {close.numel()} elements are further than {tolerance} from the reference"
    )


def tensors(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> list[torch.Tensor]:
    """q, k, v; strided: (batch, heads, seqlen, head_dim) in memory, with q's features two apart."""
    batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v = shape
    sizes = [
        (batch, seqlen_q, nheads_q, head_dim),
        (batch, seqlen_k, nheads_kv, head_dim),
        (batch, seqlen_k, nheads_kv, head_dim_v),
    ]
    if not strided:
        return [torch.randn(size).to(dtype) for size in sizes]
    q, k, v = (torch.randn(b, h, s, 2 * d).to(dtype).transpose(1, 2) for b, s, h, d in sizes)
    return [q[..., ::2], k[..., :head_dim], v[..., head_dim_v:]]


def run_attention(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, object], strided: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(shape, dtype, strided))
    do = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1])
    results = []
    for backend in ("cpu", "reference"):
        out, lse = onepass.attention(q, k, v, return_lse=True, backend=backend, **options)
        dlse_seen = torch.where(lse.isfinite(), dlse, 0.0)
        results.append((out, lse, *torch.autograd.grad((out, lse), (q, k, v), (do, dlse_seen))))
    tolerance = DTYPES[dtype] * 4
    for name, found, expected in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        compare(f"{name} of {shape} {dtype} {options} strided={strided}", found, expected, tolerance)


def run_decode(dtype: torch.dtype, seqlen_q: int, capacity: int, heads: tuple[int, int], splits: int | None) -> None:
    q, k, v = tensors((2, seqlen_q, capacity, *heads, 40, 24), dtype, strided=capacity % 2 == 1)
    lengths = torch.tensor([capacity, capacity // 2], dtype=torch.int32)
    out, expected = (
        onepass.attention_decode(q, k, v, cache_seqlens=lengths, num_splits=splits, backend=backend)
        for backend in ("cpu", "reference")
    )
    compare(f"decode {dtype} {seqlen_q} {capacity} {heads} {splits}", out, expected, DTYPES[dtype])


def run_merge(dtype: torch.dtype) -> None:
    outs, lses = torch.randn(3, 2, 5, 3, 33).to(dtype), torch.randn(3, 2, 3, 5)
    lses[0, 0, 0] = -torch.inf
    for found, expected in zip(
        *(onepass.merge_attention(outs, lses, backend=b) for b in ("cpu", "reference")), strict=True
    ):
        compare(f"merge {dtype}", found, expected, DTYPES[dtype])


def run_lab() -> None:
    for step, (seqlen_q, seqlen_k, head_dim), causal in itertools.product(
        ("naive", "blocked", "fused", "flash"), ((1, 1, 1), (37, 37, 33), (5, 70, 32), (67, 3, 20)), (False, True)
    ):
        q, k, v = tensors((2, seqlen_q, seqlen_k, 3, 3, head_dim, head_dim), torch.float32, strided=False)
        expected = onepass.attention(q, k, v, causal=causal, backend="reference")
        for blocks in ({}, {"block_q": 3, "block_k": 7}):
            if step in ("naive", "fused") and blocks:
                continue
            found = lab.attention_step(q, k, v, step=step, causal=causal, **blocks)
            compare(f"lab {step} {seqlen_q} {seqlen_k} {head_dim} {causal} {blocks}", found, expected, 1e-4)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    options = [{}, {"causal": True}, {"causal": True, "causal_alignment": "top_left"}, {"window_size": (5, 3)}]
    for shape, dtype, option, strided in itertools.product(SHAPES, DTYPES, options, (False, True)):
        run_attention(shape, dtype, option, strided)
    for dtype in DTYPES:
        mask = torch.rand(2, 33) < 0.5
        mask[0] = False  # a sequence whose keys are all hidden
        run_attention(SHAPES[1], dtype, {"key_mask": mask}, strided=False)
        for seqlen_q, capacity, heads, splits in itertools.product((1, 3), (7, 130), ((1, 1), (8, 2)), (None, 1, 3)):
            run_decode(dtype, seqlen_q, capacity, heads, splits)
        run_merge(dtype)
    run_lab()
    for dtype in (torch.float32, torch.bfloat16):
        assert fma_peak(dtype, 2, 0.001) > 0.0
    print("all kernels ran")


if __name__ == "__main__":
    main()
