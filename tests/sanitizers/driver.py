"""Runs every C++ kernel on awkward sizes; meant to run inside AddressSanitizer and UBSan (see test_sanitizers.py).

Sizes are not multiples of any tile, tensors are views with odd strides, rows are empty. Outputs are compared with the
reference, so
that a kernel which did nothing would not pass.
"""

import itertools

import torch

import onepass
from onepass import lab
from onepass.bench.bandwidth import memory_bandwidth
from onepass.bench.peak import fma_peak
from onepass.ops.attention import cpu as attention
from onepass.ops.cross_entropy import cpu as cross_entropy
from onepass.ops.norm import cpu as norm
from onepass.ops.norm import reference as norm_reference
from onepass.ops.repeat_kv import cpu as repeat_kv
from onepass.ops.rope import cpu as rope
from onepass.ops.softmax import cpu as softmax
from onepass.ops.swiglu import cpu as swiglu

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


BIASES = [(0, 0, 0, 0), (1, 1, 0, 0), (0, 1, 1, 0), (1, 0, 0, 1)]  # 1 = broadcast


def run_options(shape: tuple[int, ...], dtype: torch.dtype, bias: tuple[int, ...], dropout_p: float) -> None:
    """Every option on the scores at once, with its gradient."""
    batch, seqlen_q, seqlen_k, nheads_q = shape[:4]
    q, k, v = (x.requires_grad_() for x in tensors(shape, dtype, strided=dropout_p > 0))
    full = (batch, nheads_q, seqlen_q, seqlen_k)
    sizes = [1 if one else size for one, size in zip(bias, full, strict=True)]
    attn_bias = torch.randn(sizes).to(dtype).requires_grad_()
    sink = torch.randn(nheads_q).requires_grad_()
    options = {
        "attn_bias": attn_bias,
        "attn_sink": sink,
        "softcap": 2.0,
        "alibi_slopes": torch.rand(batch, nheads_q),
        "window_size": (30, 2),
        "dropout_p": dropout_p,
        "rng_state": torch.tensor([3, 4]) if dropout_p else None,
    }
    do = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    results = []
    for backend in ("cpu", "reference"):
        out = onepass.attention(q, k, v, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out, (q, k, v, attn_bias, sink), do)))
    for name, found, expected in zip(("out", "dq", "dk", "dv", "dbias", "dsink"), *results, strict=True):
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        compare(f"{name} of {shape} {dtype} {bias}", found / scale, expected / scale, DTYPES[dtype] * 4)


def run_caches(dtype: torch.dtype, page_size: int, cache_dtype: torch.dtype | None) -> None:
    """Decode on pages, in q's dtype or one byte an element."""
    lengths = torch.tensor([37, 20], dtype=torch.int32)
    table = torch.randperm(2 * -(-40 // page_size)).view(2, -1).to(torch.int32)
    q = torch.randn(2, 3, 4, 40).to(dtype)
    k, v = (torch.randn(table.numel(), page_size, 2, size).to(dtype) for size in (40, 24))
    scales = {}
    if cache_dtype is not None:
        k, v = (x.float().mul(8).round().to(cache_dtype) for x in (k, v))
        scales = {"k_descale": torch.full((2,), 0.125), "v_descale": torch.full((2, 2), 0.125)}
    out, expected = (
        onepass.attention_decode(
            q, k, v, cache_seqlens=lengths, page_table=table, softcap=3.0, backend=backend, **scales
        )
        for backend in ("cpu", "reference")
    )
    compare(f"decode {dtype} pages of {page_size} {cache_dtype}", out, expected, DTYPES[dtype])


def run_packed(dtype: torch.dtype) -> None:
    """Packed sequences, which share nothing: each alone gives the same."""
    lengths = torch.tensor([0, 17, 17, 90, 103], dtype=torch.int32)
    q, k, v = (torch.randn(103, heads, 33).to(dtype) for heads in (4, 2, 2))
    numbers = (None, None, None, None, None, 90, 90, 0.2, -1, 0, True, 0.0, 0.0, False)
    out, lse = attention.forward_packed(q, k, v, lengths, lengths, None, None, *numbers)
    gradients = attention.backward_packed(
        q, None, q, k, v, out, lse, lengths, lengths, None, *numbers, True, True, False, False
    )
    for begin, end in itertools.pairwise(lengths.tolist()):
        one = [x[None, begin:end].clone().requires_grad_() for x in (q, k, v)]
        expected = onepass.attention(*one, causal=True, softmax_scale=0.2, backend="reference")
        wanted = torch.autograd.grad(expected, one, q[None, begin:end])
        for found, other in zip((out, *gradients[:3]), (expected, *wanted), strict=True):
            compare(f"packed {dtype}", found[begin:end], other[0], DTYPES[dtype] * 8)


def run_decode(dtype: torch.dtype, seqlen_q: int, capacity: int, heads: tuple[int, int], splits: int | None) -> None:
    q, k, v = tensors((2, seqlen_q, capacity, *heads, 40, 24), dtype, strided=capacity % 2 == 1)
    lengths = torch.tensor([capacity, capacity // 2], dtype=torch.int32)
    out, expected = (
        onepass.attention_decode(q, k, v, cache_seqlens=lengths, num_splits=splits, backend=backend)
        for backend in ("cpu", "reference")
    )
    compare(f"decode {dtype} {seqlen_q} {capacity} {heads} {splits}", out, expected, DTYPES[dtype])


def run_append(dtype: torch.dtype, kind: str, paged: bool) -> None:
    """The caches end where the last new row is written."""
    _, k, v = tensors((2, 3, 3, 2, 2, 40, 24), dtype, strided=paged)
    places = (4, 5) if paged else (2, 10)
    lengths = torch.tensor([7, 2], dtype=torch.int32)
    table = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32) if paged else None
    options: dict[str, object] = {"page_table": table}
    stored, per_element = (torch.uint8, 2) if kind == "int4" else (torch.int8 if kind == "int8" else dtype, 1)
    caches = [torch.zeros(*places, 2, x.shape[3] // per_element).to(stored) for x in (k, v)]
    if kind == "int8":
        options |= {name: torch.rand(2, 2) + 0.02 for name in ("k_descale", "v_descale")}
    if kind == "int4":
        pairs = [torch.zeros(*places, 2, groups, 2).half() for groups in (4, 1)]
        options |= {"k_scale_shift": pairs[0], "v_scale_shift": pairs[1]}
    expected = [x.clone() for x in caches]
    onepass.append_kv(k, v, *caches, lengths, backend="cpu", **options)
    onepass.append_kv(k, v, *expected, lengths, backend="reference", **options)
    for found, wanted in zip(caches, expected, strict=True):
        compare(f"append {kind} {dtype} paged={paged}", found, wanted, 0.0)


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


ROWS = [(1, 1), (5, 17), (300, 33), (3, 4096), (2, 9001), (1, 40000), (5, 40000), (0, 7)]  # rows, columns


def rows(shape: tuple[int, int], dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """Strided: with a gap of 3 columns between rows."""
    return torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 3:] if strided else torch.randn(shape).to(dtype)


def run_norm(shape: tuple[int, int], dtype: torch.dtype, center: bool, residual: bool, strided: bool) -> None:
    x, dy = rows(shape, dtype, strided), rows(shape, dtype, strided)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1]).to(dtype) if center else None
    added = rows(shape, torch.float32 if strided else dtype, strided) if residual else None
    results = []
    for module in (norm, norm_reference):
        y, z, mean, rstd = module.forward(x, weight, bias, added, 1e-5, 0.5, center, True)
        z = x if added is None else z
        dz = None if added is None else rows(shape, z.dtype, False).fill_(0.25)
        gradients = module.backward(dy, dz, z, weight, bias, mean, rstd, 0.5, center, True, True, center)
        results.append((y, z, mean, rstd, *gradients))
    for name, found, expected in zip(
        ("y", "residual_out", "mean", "rstd", "dx", "dweight", "dbias"), *results, strict=True
    ):
        compare(f"norm's {name} {shape} {dtype} {center} {residual}", found, expected, 8 * DTYPES[dtype])


def run_rows(shape: tuple[int, int], dtype: torch.dtype, strided: bool) -> None:
    """softmax, the gated units and cross entropy against autograd."""
    x, up, dy = (rows(shape, dtype, strided) for _ in range(3))
    wide_x, wide_up = x.double().requires_grad_(), up.double().requires_grad_()
    y = torch.softmax(wide_x, -1)
    found = softmax.forward(x)
    compare(f"softmax {shape} {dtype}", found, y, DTYPES[dtype])
    (dx,) = torch.autograd.grad(y, wide_x, dy.double())
    compare(f"softmax's dx {shape} {dtype}", softmax.backward(dy, found), dx, DTYPES[dtype])

    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
    }
    for activation, function in functions.items():
        out = function(wide_x) * wide_up
        compare(f"{activation} {shape} {dtype}", swiglu.forward(x, up, activation), out, DTYPES[dtype])
        expected = torch.autograd.grad(out, (wide_x, wide_up), dy.double())
        for gradient, wanted in zip(swiglu.backward(dy, x, up, activation, True, True), expected, strict=True):
            compare(f"{activation}'s gradient {shape} {dtype}", gradient, wanted, DTYPES[dtype])

    target = torch.randint(shape[1], (shape[0],))
    target[1:2] = -100
    for softcap in (0.0, 5.0):
        logits = softcap * torch.tanh(wide_x / softcap) if softcap else wide_x
        lse = torch.logsumexp(logits, -1)
        picked = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        losses = lse - 0.9 * picked - 0.1 * logits.mean(-1) + 0.01 * lse**2
        losses = torch.where(target == -100, 0.0, losses)
        options = (-100, 0.1, 0.01, softcap)
        loss, found = cross_entropy.forward(x, target, *options)
        compare(f"cross_entropy {shape} {dtype} {softcap}", loss, losses, 1e-4)
        (dx,) = torch.autograd.grad(losses.sum(), wide_x)
        gradient = cross_entropy.backward(torch.ones(1).expand(shape[0]), None, x, target, found, *options)
        compare(f"cross_entropy's dlogits {shape} {dtype} {softcap}", gradient, dx, DTYPES[dtype])


def run_heads(dtype: torch.dtype, head_dim: int, rotary_dim: int, strided: bool) -> None:
    """rope there and back, repeat_kv and its gradient."""
    q, k, _ = tensors((2, 37, 37, 4, 2, head_dim, head_dim), dtype, strided)
    angles = torch.rand(50, rotary_dim // 2)
    positions = torch.randint(50, (2, 37), dtype=torch.int32)
    for interleaved in (False, True):
        turned = rope.forward(q, k, angles.cos(), angles.sin(), positions, interleaved, False)
        back = rope.forward(*turned, angles.cos(), angles.sin(), positions, interleaved, True)
        for before, after in zip((q, k), back, strict=True):
            compare(f"rope {dtype} {head_dim} {rotary_dim} {interleaved}", after, before, DTYPES[dtype])
    message = ""
    try:
        rope.forward(q, k, angles.cos()[:9], angles.sin()[:9], positions, False, False)
    except ValueError as error:
        message = str(error)
    assert "position_ids" in message, "positions out of range were not found"
    compare(f"repeat_kv {dtype}", repeat_kv.forward(k, 3), k.repeat_interleave(3, 2), 0.0)
    summed = q.double().unflatten(2, (2, 2)).sum(3)
    compare(f"repeat_kv's dx {dtype}", repeat_kv.backward(q, 2), summed, DTYPES[dtype])


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
        for kind, paged in itertools.product(("as it is", "int8", "int4"), (False, True)):
            run_append(dtype, kind, paged)
        for shape, bias, dropout_p in itertools.product(SHAPES, BIASES, (0.0, 0.4)):
            run_options(shape, dtype, bias, dropout_p)
        for page_size, cache_dtype in itertools.product((1, 7, 16), (None, torch.int8, torch.float8_e5m2)):
            run_caches(dtype, page_size, cache_dtype)
        run_packed(dtype)
        for shape, strided in itertools.product(ROWS, (False, True)):
            for center, residual in itertools.product((False, True), (False, True)):
                run_norm(shape, dtype, center, residual, strided)
            run_rows(shape, dtype, strided)
        for head_dim, rotary_dim, strided in itertools.product((33, 64), (2, 18, 32), (False, True)):
            run_heads(dtype, head_dim, rotary_dim, strided)
    run_lab()
    for access in ("read", "copy", "stream"):
        assert memory_bandwidth(access, 100_000, 2, 5_000, 0.001) > 0.0
    for dtype in (torch.float32, torch.bfloat16):
        assert fma_peak(dtype, 2, 0.001) > 0.0
    print("all kernels ran")


if __name__ == "__main__":
    main()
