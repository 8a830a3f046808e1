"""Problems of operations: how they are checked, what a peer that overwrites or fails does to them, what ops list."""

import dataclasses
from functools import partial

import pytest
import torch

from onepass.bench import peers, problems, registry, report
from onepass.bench.peers import Peer
from onepass.bench.problems import BACKWARD, BOTH, FORWARD

OPERATIONS = ("cross_entropy", "norm", "repeat_kv", "rope", "softmax", "swiglu")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """torch.compile takes seconds a case, and is PyTorch's to test."""
    monkeypatch.setattr(problems, "compiled", lambda call, direction: call)


def small(name):
    """A small problem of every operation of one bench.py."""
    if name == "cross_entropy":
        from onepass.ops.cross_entropy import bench

        linear = [bench.linear_problem(operation, 90, 32, 200) for operation in (bench.LINEAR, bench.LOW_MEMORY)]
        return [bench.problem(90, 200), *linear]
    if name == "norm":
        from onepass.ops.norm import bench

        return [bench.problem(operation, 90, 128) for operation in bench.BOTH_NORMS]
    if name == "repeat_kv":
        from onepass.ops.repeat_kv import bench

        return [bench.problem(2, 90)]
    if name == "rope":
        from onepass.ops.rope import bench

        return [bench.problem(2, 90, 4, 2)]
    if name == "softmax":
        from onepass.ops.softmax import bench

        return [bench.problem(90, 128)]
    from onepass.ops.swiglu import bench

    return [bench.problem(operation, 90, 128) for operation in bench.BOTH_GATES]


def softmax(**more):
    """A softmax with these peers besides eager."""
    (problem,) = small("softmax")
    operation = dataclasses.replace(problem.operation, peers={"eager": peers.SOFTMAX["eager"], **more})
    return dataclasses.replace(problem, operation=operation)


def prepared(problem, direction=FORWARD, dtype=torch.float32):
    torch.manual_seed(0)
    return problem.case(direction, "cpu", dtype).prepare()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_provider_is_within_its_budget(name, direction, dtype):
    for problem in small(name):
        found = prepared(problem, direction, dtype)
        with torch.set_grad_enabled(found.grad):
            errors = found.errors()
        assert list(errors) == list(found.providers) == ["onepass-cpu", "eager", "torch.compile"]
        assert max(errors.values()) <= 1.0
        assert found.absent == {}


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
@pytest.mark.parametrize("row", [0, 89])
def test_wrong_rows_show(direction, row):
    def wrong(x):
        y = torch.softmax(x, -1)
        weight = torch.ones(len(x), 1)
        weight[row] = 1.1
        return y * weight

    found = prepared(softmax(wrong=Peer(wrong)), direction)
    with torch.set_grad_enabled(found.grad):
        errors = found.errors()
    assert errors["wrong"] > 10 > errors["eager"]


def test_wrong_gradients_of_weights_show():
    problem = small("norm")[0]
    operation = dataclasses.replace(
        problem.operation, peers={"wrong": Peer(lambda x, weight: peers._rms_norm(x, weight.detach() + 0.1 * weight))}
    )
    found = prepared(dataclasses.replace(problem, operation=operation), BACKWARD)
    with torch.enable_grad():
        assert found.errors()["wrong"] > 10


def test_a_peer_that_fails_is_left_out_with_its_reason():
    def fails(x):
        raise RuntimeError("no kernel image\nand more")

    for direction in (FORWARD, BACKWARD):
        found = prepared(softmax(fails=Peer(fails)), direction)
        with torch.set_grad_enabled(found.grad):
            assert "fails" not in found.errors()
        assert found.absent == {"fails": "RuntimeError: no kernel image"}


def test_what_fails_of_ours_is_raised():
    def fails(x, backend):
        raise RuntimeError("ours")

    problem = softmax()
    operation = dataclasses.replace(problem.operation, call=fails)
    with pytest.raises(RuntimeError, match="ours"):
        prepared(dataclasses.replace(problem, operation=operation))


def test_peers_of_gpus_are_listed_there_alone(monkeypatch):
    (problem,) = small("softmax")
    assert list(problems.contenders(problem.operation, "cpu", FORWARD)) == ["onepass-cpu", "eager", "torch.compile"]
    on_gpu = problems.contenders(problem.operation, "cuda", FORWARD)
    assert list(on_gpu) == ["onepass-triton", "eager", "torch.compile", "liger", "quack"]
    absent = Peer(lambda x: x, package="onepass_no_such_package")
    assert absent.unavailable() == "onepass_no_such_package is not installed"
    found = problems._prepared(
        problem.operation, {**problems.contenders(problem.operation, "cpu", FORWARD), "no": absent}, FORWARD,
        problem.draw("cpu", torch.float32),
    )  # fmt: skip
    assert found.absent == {"no": "onepass_no_such_package is not installed"}


class Overwrites(torch.autograd.Function):
    """silu(gate) * up whose backward writes over its inputs and the incoming gradient, as Liger's does."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, do):
        gate, up = (x.data for x in ctx.saved_tensors)
        s = torch.sigmoid(gate)
        d_gate, d_up = do * up * s * (1 + gate * (1 - s)), do * gate * s
        gate.copy_(d_gate), up.copy_(d_up), do.data.zero_()
        return gate, up


def overwriting(gate, up):
    return Overwrites.apply(gate, up)


@pytest.mark.parametrize("direction", [BACKWARD, BOTH])
def test_what_a_peer_overwrites_is_its_own_and_restored(direction):
    problem = small("swiglu")[0]
    peer = Peer(overwriting, overwrites=("gate", "up", "do"))
    operation = dataclasses.replace(problem.operation, peers={"eager": peers.SWIGLU["eager"], "theirs": peer})
    found = prepared(dataclasses.replace(problem, operation=operation), direction)
    assert list(found.resets) == ["theirs"]
    with torch.enable_grad():
        assert max(found.errors().values()) <= 1.0
        expected = [x.clone() for x in found.providers["eager"]()]
        for _ in range(2):
            found.resets["theirs"]()
            for x, y in zip(found.providers["theirs"](), expected, strict=True):
                torch.testing.assert_close(x, y)
        for x, y in zip(found.providers["eager"](), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
def test_a_compiled_backward_runs_again(direction, monkeypatch):
    monkeypatch.undo()
    problem = softmax()
    found = prepared(problem, direction)
    with torch.set_grad_enabled(found.grad):
        assert found.errors()["torch.compile"] <= 1.0
        assert found.absent == {}
        for _ in range(3):
            found.providers["torch.compile"]()


def test_large_results_are_compared_in_part():
    x = torch.arange(3.0 * problems.CHECKED_ELEMENTS)
    part = problems._limited(x)
    assert len(part) == problems.CHECKED_ELEMENTS
    assert part[0] == x[0]
    assert part[-1] == x[-1]


def test_unchecked_targets_do_not_count():
    target = problems.only_rows_count(torch.full((6,), 9), torch.tensor([0, 5]))
    assert target.tolist() == [0, -100, -100, -100, -100, 1]


@pytest.mark.parametrize("name", OPERATIONS)
def test_groups_have_what_is_needed(name):
    benchmark = registry.find(name)
    names = [group.name for group in benchmark.groups]
    assert len(set(names)) == len(names)
    assert {group.device for group in benchmark.groups} == {"cpu", "cuda"}
    cpu = [f"cpu-{direction}-{pages}" for direction in (FORWARD, BOTH) for pages in ("reused", "fresh")]
    assert [group.name for group in benchmark.on("cpu")] == cpu
    assert names[-5] == "host"
    for group in benchmark.groups:
        for case in group.cases:
            known = all(bar in report.BARS or bar.startswith(report.RATIO_TO) for bar in case.bars)
            assert known, case.bars
            assert not case.bars.get("gbps") or case.min_bytes
            assert group.clock == "host" or bool(case.min_bytes) != bool(case.flops)
        assert group.device == "cuda" or any(case.quick for case in group.cases)


def test_bytes_are_those_of_the_least_traffic():
    n = 90 * 128
    (problem,) = small("softmax")
    counted = {direction: problem.case(direction, "cpu", torch.bfloat16).min_bytes for direction in (FORWARD, BACKWARD)}
    assert counted == {FORWARD: 2 * 2 * n, BACKWARD: 3 * 2 * n}


def test_pages_are_reused_or_fresh():
    assert problems.PAGES["fresh"] == {}
    groups = {group.name: group for group in registry.find("norm").on("cpu")}
    assert "MALLOC_MMAP_THRESHOLD_" in groups["cpu-forward-reused"].settings
    bars = {case.name: case.bars for case in groups["cpu-forward-reused"].cases}
    assert bars["rms_norm 4096x4096 fp32"] == {"ratio": 1.3, "percent_of_bandwidth": 85.0}
    assert bars["layer_norm 4096x4096 fp32"] == {"ratio": 1.3}
    assert "percent_of_bandwidth" not in groups["cpu-forward-fresh"].cases[0].bars


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gpu_providers_are_within_their_limits(name, direction):
    for problem in small(name):
        found = problem.case(direction, "cuda", torch.bfloat16).prepare()
        with torch.set_grad_enabled(found.grad):
            errors = found.errors()
            assert errors["onepass-triton"] <= 1.0
            for provider in errors:
                found.resets.get(provider, lambda: None)()
                found.providers[provider]()
        host = partial(problems.prepare_host, problem)()
        with torch.no_grad():
            assert host.errors()["onepass"] <= 1.0
