"""Attention's benchmarks: what is counted, what every contender computes, on tiny sizes and without a GPU."""

import dataclasses
import math

import pytest
import torch

import onepass
from onepass.bench import problems, registry, report, run
from onepass.bench.problems import BACKWARD, BOTH, FORWARD
from onepass.core import kv_formats
from onepass.ops.attention.bench import contenders, decode, gpu, options
from onepass.ops.attention.bench.problem import Problem, constants, pieces

PLAIN = Problem(2, 4, 96, 16)
CAUSAL = dataclasses.replace(PLAIN, causal=True)
VARLEN = Problem(1, 4, 160, 16, causal=True, mean_length=40)
SMALL = {  # -> peers that run on the CPU
    PLAIN: (contenders.FLASH, contenders.FLEX, contenders.NAIVE),
    CAUSAL: (contenders.FLASH, contenders.FLEX, contenders.NAIVE, contenders.MASK),
    dataclasses.replace(CAUSAL, heads_kv=2): (contenders.FLASH, contenders.FLEX, contenders.NAIVE),
    dataclasses.replace(CAUSAL, window=20): (contenders.MASK, contenders.FLEX, contenders.NAIVE),
    dataclasses.replace(CAUSAL, alibi=True): (contenders.MASK, contenders.FLEX, contenders.NAIVE),
    dataclasses.replace(CAUSAL, softcap=2.0): (contenders.FLEX, contenders.NAIVE),
    dataclasses.replace(PLAIN, bias=True): (contenders.MASK, contenders.FLEX, contenders.NAIVE),
    VARLEN: (contenders.PADDED, contenders.LOOP, contenders.FLEX),
    dataclasses.replace(VARLEN, causal=False): (contenders.PADDED, contenders.LOOP, contenders.FLEX),
}


def loop(q, k, v, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, **options):
    """attention_varlen by its definition."""
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    parts = [x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)]
    outs = [onepass.attention(*(x.unsqueeze(0) for x in three), **options)[0] for three in zip(*parts, strict=True)]
    return torch.cat(outs)


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    """Ours is the reference, FlexAttention is not compiled, and attention_varlen is there."""
    monkeypatch.setitem(problems.BACKENDS, "cpu", "reference")
    monkeypatch.setattr(contenders, "compiled", lambda call: call)
    monkeypatch.setattr(decode, "compiled", lambda call: call)
    if not hasattr(onepass, "attention_varlen"):
        monkeypatch.setattr(onepass, "attention_varlen", loop, raising=False)
    contenders.flex_call.cache_clear()
    yield
    contenders.flex_call.cache_clear()


def errors_of(prepared):
    with torch.set_grad_enabled(prepared.grad):
        return prepared.errors()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_every_contender_computes_the_same(problem, direction, dtype):
    torch.manual_seed(0)
    peers = tuple(p for p in SMALL[problem] if direction == FORWARD or p != contenders.FLEX)  # forward only on the CPU
    prepared = contenders.prepare(problem, direction, "cpu", dtype, peers)
    assert prepared.absent == {}
    errors = errors_of(prepared)
    assert list(errors) == ["onepass-cpu", *peers]
    assert errors["onepass-cpu"] <= 1.0
    assert max(errors.values()) < (4.0 if dtype is torch.float32 else run.PEER_ERROR_LIMIT)
    with torch.set_grad_enabled(prepared.grad):
        for call in prepared.providers.values():  # a backward alone can run again
            call()


@pytest.mark.parametrize("direction", [BOTH])
def test_the_gradient_of_the_bias(direction):
    torch.manual_seed(0)
    problem = dataclasses.replace(PLAIN, bias=True, bias_gradient=True)
    prepared = contenders.prepare(problem, direction, "cpu", torch.float32, (contenders.MASK, contenders.NAIVE))
    errors = errors_of(prepared)
    assert list(errors) == ["onepass-cpu", contenders.MASK, contenders.NAIVE]
    assert max(errors.values()) < 4.0
    with torch.enable_grad():
        *_, dbias = prepared.providers["onepass-cpu"]()
    assert dbias.shape == (1, 4, 96, 96)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("problem", [CAUSAL, VARLEN], ids=lambda problem: problem.name)
def test_wrong_numbers_show(problem, direction, monkeypatch):
    """Another mask than ours, on the last query alone."""

    def wrong(asked, fixed, device, dtype):
        honest = contenders.ours(asked, fixed, device, dtype)

        def call(q, k, v):
            out = honest.call(q, k, v)
            weight = torch.ones(out.shape[-3], 1, 1)
            weight[-1] = 1.2
            return out * weight

        return contenders.Contender(call)

    monkeypatch.setattr(contenders, "BUILDERS", {"wrong": wrong})
    errors = errors_of(contenders.prepare(problem, direction, "cpu", torch.float32, ("wrong",)))
    assert errors["wrong"] > 10
    assert errors["onepass-cpu"] <= 1


def test_peers_that_cannot_run_are_left_out_with_their_reason():
    prepared = contenders.prepare(CAUSAL, BACKWARD, "cpu", torch.float32, (contenders.FLASH_4, contenders.FLASH))
    assert prepared.absent == {contenders.FLASH_4: "ImportError: flash_attn.cute is not installed"}
    assert list(errors_of(prepared)) == ["onepass-cpu", contenders.FLASH]


def test_flash_attn_4_gets_our_layout(monkeypatch):
    seen = {}

    def dense(q, k, v, causal, window_size=(None, None)):
        seen["window_size"] = window_size
        size = {} if window_size[0] is None else {"window_size": window_size}
        return onepass.attention(q, k, v, causal=causal, backend="reference", **size), None

    def varlen(q, k, v, **given):
        return loop(q, k, v, given.pop("cu_seqlens_q"), given.pop("cu_seqlens_k"), backend="reference", **given)

    monkeypatch.setattr(contenders, "flash_4_functions", lambda: (dense, varlen))
    for problem in (CAUSAL, dataclasses.replace(CAUSAL, window=20), VARLEN):
        prepared = contenders.prepare(problem, BACKWARD, "cpu", torch.float32, (contenders.FLASH_4,))
        assert max(errors_of(prepared).values()) <= 1.0
    assert seen["window_size"] == (20, 0)


def test_what_ours_cannot_do_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(problems.BACKENDS, "cpu", "triton")
    refused = contenders.case(CAUSAL, FORWARD, "cpu", torch.float32, ())
    with pytest.raises(registry.SkippedError, match=r"^triton: tensors are on cpu$"):
        refused.prepare()
    fine = registry.Prepared({"ours": lambda: None}, lambda: {"ours": 0.1})
    cases = (refused, registry.Case("fine", {}, "float32", lambda: fine))
    settings = run.Settings(num_threads=1, repeats=2, sample_seconds=1e-4)
    lines = []
    groups = (registry.Group("some", "Some", cases), registry.Group("none", "None", cases[:1]))
    result = run.run(registry.Benchmark("toy", groups), settings, tmp_path / "toy.json", progress=lines.append)
    assert list(result["groups"]) == ["some"]
    group = result["groups"]["some"]
    assert [row["name"] for row in group["cases"]] == ["fine"]
    assert "triton" in group["skipped"][CAUSAL.name]
    assert any("is skipped: " in line for line in lines)
    assert f"skipped, {CAUSAL.name}: " in report.group_table("some", group).caption


# What is counted.


def brute_pairs(problem):
    n = problem.seqlen
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = torch.ones(n, n, dtype=torch.bool)
    if problem.causal:
        seen &= j <= i
    if problem.window:
        seen &= i - j <= problem.window
    if problem.packed:
        document = torch.repeat_interleave(torch.arange(len(problem.lengths)), torch.tensor(problem.lengths))
        seen &= document[:, None] == document
    return int(seen.sum())


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_flops_are_those_of_the_pairs_that_are_seen(problem):
    forward = 4.0 * problem.batch * problem.heads * brute_pairs(problem) * problem.head_dim
    assert problem.flops(FORWARD) == forward
    assert problem.flops(BACKWARD) == 2.5 * forward
    assert problem.flops(BOTH) == 3.5 * forward


def test_packed_sequences_fill_the_total_and_vary():
    lengths = Problem(1, 16, 16384, 128, causal=True, mean_length=1024).lengths
    assert sum(lengths) == 16384
    assert len(lengths) == 16
    assert min(lengths) > 0
    assert len(set(lengths)) > 8
    fixed = constants(VARLEN, "cpu", torch.float32)
    assert fixed.cu_seqlens.tolist()[::4] == [0, 160]


def test_checked_pieces_are_few_on_large_problems():
    assert len(pieces(Problem(1, 16, 16384, 128))) == 1
    assert len(pieces(Problem(4, 16, 4096, 128))) == 2
    small = pieces(PLAIN)
    assert len(small) == 4
    assert (small[0].head, small[-1].head) == (3, 0)


def test_cases_and_bars():
    benchmark = registry.find("attention")
    names = [group.name for group in benchmark.groups]
    assert len(set(names)) == len(names)
    flex = set()
    for group in benchmark.groups:
        assert group.name.startswith("cuda-") == (group.device == "cuda")
        assert len({case.name for case in group.cases}) == len(group.cases)
        for case in group.cases:
            known = all(bar in report.BARS or bar.startswith(report.RATIO_TO) for bar in case.bars)
            assert known, case.bars
            if getattr(case.prepare, "func", None) is not contenders.prepare:
                continue
            peers = case.prepare.args[-1]
            assert set(peers) <= set(contenders.BUILDERS)
            assert {bar.removeprefix(report.RATIO_TO) for bar in case.bars if bar.startswith(report.RATIO_TO)} <= set(
                peers
            )
            if contenders.FLEX in peers and group.device == "cuda":
                flex.add(case.prepare.args[0])
    assert len(flex) + len(decode.FLEX_SIZES) <= 12  # each takes many seconds to compile
    backward = {case.name: case.bars for case in benchmark.group("cuda-backward").cases}
    assert sum("ratio to flex" in bars for bars in backward.values()) == 4
    assert benchmark.group("cuda-backward").mean_bars == {"flex": 1.05}
    forward = {case.name: case.bars for case in benchmark.group("cuda-forward").cases}
    assert forward["4,16,4096,128 causal"] == {"ratio to flex": 1.1, "ratio to sdpa flash": 1.4}
    assert forward["4,32,4096,64"] == {"ratio to flex": 1.1}
    assert len(forward) == len(backward) == 14
    for name in ("cuda-options-forward", "cuda-options-backward"):
        assert [case.bars for case in benchmark.group(name).cases] == [{"ratio to flex": 1.1}] * len(gpu.OPTIONS)
    for group in options.GROUPS:
        assert [case.bars for case in group.cases] == [{"ratio": 1.5}] * 10


def test_mean_bars_are_of_the_cases_with_a_bar():
    def row(name, ratio, bars, peers=("flex", "other")):
        ratios = {peer: {"median": ratio if peer == "flex" else 0.1, "low": 0.0, "high": 9.0} for peer in peers}
        seconds = {"ours": {"median": 1.0}}
        summary = {"ratios": ratios, "best_peer": "other", "seconds": seconds}
        return {"name": name, "bars": bars, "samples": dict.fromkeys(("ours", *peers)), "summary": summary}

    bars = {"ratio to flex": 1.0}
    cases = [row("a", 1.0, bars), row("b", 1.21, bars), row("c", 0.2, {})]
    group = {"cases": cases, "mean_bars": {"flex": 1.1}}
    (found,) = report.mean_bars("group", group)
    assert found.measured == pytest.approx(1.1)
    assert found.met is True
    (found,) = report.mean_bars("group", {**group, "mean_bars": {"flex": 1.13}})
    assert found.met is False
    (found,) = report.mean_bars("group", {**group, "cases": [*cases, row("d", 1.0, bars, ("other",))]})
    assert found.met is None
    assert math.isnan(found.measured)


# Decode.

TINY = decode.Size(2, 4, 2, 64), decode.Size(1, 4, 4, 32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("size", TINY, ids=lambda size: size.name)
def test_decode_contenders_compute_the_same(size, monkeypatch):
    monkeypatch.setattr(decode, "FLEX_SIZES", TINY)
    torch.manual_seed(0)
    prepared = decode.prepare(size, "cpu")
    errors = errors_of(prepared)
    assert errors["onepass-cpu"] <= 1.0
    assert {"onepass-cpu", contenders.FLASH, contenders.FLEX} <= errors.keys()
    assert max(errors.values()) < run.PEER_ERROR_LIMIT
    assert contenders.FLASH_4 in prepared.absent


def test_folded_heads_are_those_of_their_kv_head(monkeypatch):
    monkeypatch.setattr(decode, "sdpa", lambda backend, q, k, v: torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
    torch.manual_seed(0)
    size = TINY[0]
    q, k, v = decode.draw(size, "cpu")
    call = decode.peers(size, q, k, v)[decode.FOLDED]()
    assert decode.errors_of(call, q, decode.contiguous(k, v), size) < 5


@pytest.mark.parametrize("kind", decode.CACHES)
@pytest.mark.parametrize("size", TINY, ids=lambda size: size.name)
def test_other_caches_hold_the_numbers(kind, size):
    torch.manual_seed(0)
    prepared = decode.prepare_cache(kind, size, "cpu")
    assert prepared.own == {decode.CONTIGUOUS}
    errors = errors_of(prepared)
    assert list(errors) == ["onepass-cpu", decode.CONTIGUOUS]
    assert max(errors.values()) <= 1.0
    _, k, v = decode.draw(size, "cpu")
    stored = decode.CACHES[kind][0](k, v)
    for sequence, head in ((0, 0), (size.batch - 1, size.heads_kv - 1)):
        for held, given in zip(stored.numbers(sequence, head), (k, v), strict=True):
            exact = given[sequence, :, head].double()
            assert (held[0, :, 0] - exact).norm() < 0.15 * exact.norm()


def test_int4_rows_hold_their_numbers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, decode.HEAD_DIM, dtype=torch.bfloat16)
    stored, scale_shift = onepass.quantize_kv_int4(x)
    numbers = kv_formats.dequantize_int4(stored, scale_shift, torch.float64)
    assert ((numbers - x.double()).abs() <= 0.6 * scale_shift[..., 0, :1].double()).all()
    exact = (stored[..., 5] & 15) * scale_shift[..., 0, 0].double() + scale_shift[..., 0, 1].double()
    assert torch.equal(numbers[..., 10], exact)  # an even feature is the low nibble


def test_bytes_of_caches():
    cases = {case.name: case for group in decode.GROUPS for case in group.cases}
    plain, paged, fp8 = (cases[f"{kind}b64 32/8 kv8192"] for kind in ("", "paged 16 ", "fp8 "))
    assert plain.min_bytes == paged.min_bytes == 2 * 64 * 8192 * 8 * 128 * 2
    assert fp8.min_bytes == plain.min_bytes / 2
    assert fp8.bytes_of == {decode.CONTIGUOUS: plain.min_bytes}
    assert {case.bars["ratio to cudnn"] for case in decode.GROUPS[0].cases} == {0.97}
    assert decode.GROUPS[0].mean_bars == {"cudnn": 1.0}
    assert cases["int4 b64 32/8 kv8192"].min_bytes == 2 * 64 * 8192 * 8 * (64 + 4)
    bars = [case.bars[f"ratio to {decode.CONTIGUOUS}"] for case in decode.GROUPS[1].cases]
    assert bars == [0.95] * 4 + [1.7] * 4 + [2.5] * 4


@pytest.mark.parametrize("decoding", [False, True], ids=["forward", "decode"])
def test_host_calls_are_checked(decoding):
    errors = errors_of(gpu.prepare_host(decoding, "cpu"))
    assert list(errors) == ["onepass", "sdpa"]
    assert errors["onepass"] <= 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_gpu_contenders_are_within_their_limits(problem, direction):
    peers = tuple(peer for peer in SMALL[problem] if peer != contenders.FLEX)
    prepared = contenders.prepare(problem, direction, "cuda", torch.bfloat16, peers)
    assert errors_of(prepared)["onepass-triton"] <= 1.0
