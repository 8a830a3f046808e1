"""Calls that csrc/replay.cpp does again: the same results, and never where something else could want to see them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import onepass
from onepass.core import cpu_library, launches, replay
from onepass.ops.cross_entropy import registration as cross_entropy
from onepass.ops.norm import registration as norm
from onepass.ops.repeat_kv import registration as repeat_kv
from onepass.ops.rope import registration as rope
from onepass.ops.softmax import registration as softmax
from onepass.ops.swiglu import registration as swiglu
from onepass.testing.replays import SEEN, Ordinary

pytestmark = pytest.mark.skipif(
    cpu_library.host_functions() is None, reason="this PyTorch lacks the C interface that replays need"
)


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    softmax.softmax.forget()


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch, device: str) -> Ordinary:
    """Softmax's, with a plan for (4, 16) and backend "" on the device."""
    found = Ordinary(softmax.softmax, monkeypatch)
    for _ in range(SEEN):
        onepass.softmax(torch.randn(4, 16, device=device))
    found.count = 0
    return found


def _calls(device: str, generator: torch.Generator) -> dict[str, tuple[replay.PlainCalls, Callable[[], Any]]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    cos, sin = onepass.rope_table(32, 8, device=device)
    return {
        "softmax": (softmax.softmax, lambda: onepass.softmax(draw(4, 48))),
        "rms_norm": (norm.norm, lambda: onepass.rms_norm(draw(4, 48), draw(48))),
        "layer_norm": (norm.norm, lambda: onepass.layer_norm(draw(4, 48), draw(48), draw(48))),
        "residual": (norm.norm, lambda: onepass.rms_norm(draw(4, 48), draw(48), residual=draw(4, 48))),
        "swiglu": (swiglu.gated, lambda: onepass.swiglu(draw(4, 48), draw(4, 48))),
        "rope": (rope.rotated, lambda: onepass.rope(draw(2, 8, 4, 32), draw(2, 8, 2, 32), cos, sin)),
        "repeat_kv": (repeat_kv.repeated, lambda: onepass.repeat_kv(draw(2, 8, 2, 32), 2)),
    }


OPERATIONS = ("softmax", "rms_norm", "layer_norm", "residual", "swiglu", "rope", "repeat_kv")


@pytest.mark.parametrize("name", OPERATIONS)
def test_replayed_calls_give_the_same(
    name: str, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, call = _calls(device, generator)[name]
    calls.forget()
    counted = Ordinary(calls, monkeypatch)
    for _ in range(SEEN):
        call()
    before = counted.count
    state = generator.get_state()
    outputs = call()
    assert counted.count == before, "the call was not replayed"
    generator.set_state(state)
    with replay.paused():
        expected = call()
    assert counted.count == before + 1
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    assert len(several) == len(wanted)
    for out, other in zip(several, wanted, strict=True):
        assert torch.equal(out, other)
        assert (out.dtype, out.stride(), out.device) == (other.dtype, other.stride(), other.device)
        assert not out.requires_grad


@pytest.mark.gpu
def test_losses_are_replayed_on_gpus(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Ordinary(cross_entropy.cross_entropy, monkeypatch)
    logits = torch.randn(8, 33, generator=generator).cuda()
    target = torch.randint(33, (8,), generator=generator).cuda()
    expected = torch.nn.functional.cross_entropy(logits, target)
    losses = [onepass.cross_entropy(logits, target) for _ in range(5)]
    assert counted.count == 2
    torch.testing.assert_close(torch.stack(losses), expected.expand(5))


def test_outputs_are_fresh_and_freed(ordinary: Ordinary, device: str) -> None:
    x = torch.randn(4, 16, device=device)
    first, second = onepass.softmax(x), onepass.softmax(x)
    assert ordinary.count == 0
    assert first.data_ptr() != second.data_ptr()
    assert first._use_count() == 1
    assert x._use_count() == 1


def test_another_look_is_another_call(ordinary: Ordinary, device: str) -> None:
    """Shape, strides, dtype and options: each makes a call that has not been seen."""
    x = torch.randn(4, 16, device=device)
    for other in (x[:2], x.half(), torch.randn(16, 4, device=device).T, x.unsqueeze(0), x.double().float()[:, :8]):
        before = ordinary.count
        torch.testing.assert_close(onepass.softmax(other), torch.softmax(other, -1), rtol=2e-3, atol=1e-4)
        assert ordinary.count == before + 1
    onepass.softmax(x, backend="reference")
    assert ordinary.count == 6
    with pytest.raises(ValueError, match="nowhere"):
        onepass.softmax(x, backend="nowhere")


def test_alignment_is_part_of_the_look(ordinary: Ordinary, device: str) -> None:
    memory = torch.randn(4 * 16 + 1, device=device)
    shifted = memory[1:].view(4, 16)
    torch.testing.assert_close(onepass.softmax(shifted), torch.softmax(shifted, -1))
    assert ordinary.count == 1


def test_gradients_go_the_ordinary_way(ordinary: Ordinary, device: str) -> None:
    x = torch.randn(4, 16, device=device, requires_grad=True)
    y = onepass.softmax(x)
    assert ordinary.count == 1
    assert y.requires_grad
    with torch.no_grad():
        assert not onepass.softmax(x).requires_grad
    assert ordinary.count == 1  # without recording a parameter is as good as any


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def test_whoever_wants_to_see_the_call_sees_it(ordinary: Ordinary, device: str) -> None:
    x = torch.randn(4, 16, device=device)
    with _Seen() as seen:
        onepass.softmax(x)
    assert "onepass::softmax_fwd" in seen.names
    with torch.profiler.profile() as profile:
        onepass.softmax(x)
    assert any("softmax_fwd" in event.key for event in profile.key_averages())
    onepass.softmax(x.as_subclass(_Subclass))
    negated = torch._neg_view(x)
    torch.testing.assert_close(onepass.softmax(negated), torch.softmax(-x, -1))
    assert ordinary.count == 4


def test_tensors_that_share_memory_are_told_apart(device: str, generator: torch.Generator) -> None:
    """A plan made from swiglu(x, x) would give the second argument the first one's memory."""
    swiglu.gated.forget()
    x, y = (torch.randn(3, 40, generator=generator).to(device) for _ in range(2))
    for _ in range(SEEN + 1):
        torch.testing.assert_close(onepass.swiglu(x, x), torch.nn.functional.silu(x) * x)
    for _ in range(SEEN + 1):
        torch.testing.assert_close(onepass.swiglu(x, y), torch.nn.functional.silu(x) * y)


def test_copies_are_never_planned(device: str, generator: torch.Generator) -> None:
    """Strides that a kernel cannot read are copied first, which a plan would forget."""
    softmax.softmax.forget()
    x = torch.randn(16, 3, 4, generator=generator).to(device).permute(1, 2, 0)
    for _ in range(SEEN + 1):
        x.add_(1.0).mul_(1.1)
        torch.testing.assert_close(onepass.softmax(x), torch.softmax(x, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """Neither what a kernel fills nor what a plan allocates is of the default dtype."""
    x, weight, bias = (torch.randn(shape, generator=generator).to(device) for shape in ((64, 48), (48,), (48,)))
    target = torch.randint(48, (64,), generator=generator).to(device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    functional = torch.nn.functional

    def call(inputs: list[Tensor], ours: bool) -> list[Tensor]:
        if ours:
            return [onepass.layer_norm(*inputs), onepass.cross_entropy(inputs[0], target), onepass.softmax(inputs[0])]
        normed = functional.layer_norm(inputs[0], (48,), *inputs[1:])
        return [normed, functional.cross_entropy(inputs[0], target), torch.softmax(inputs[0], -1)]

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        directions = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view(y.shape) for y in outputs]
        return torch.autograd.grad(outputs, leaves, directions)

    expected, wanted = call([x, weight, bias], False), gradients(call(leaves, False))
    before = torch.get_default_dtype()
    try:
        for default in (dtype, before):
            torch.set_default_dtype(default)
            for _ in range(SEEN + 1):
                for out, other in zip(call([x, weight, bias], True), expected, strict=True):
                    torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-5)
                for grad, other in zip(gradients(call(leaves, True)), wanted, strict=True):
                    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_default_dtype(before)


def test_watching_a_call_imports_nothing_large() -> None:
    code = (
        "import sys, torch, onepass\n"
        "for _ in range(4): onepass.softmax(torch.ones(2, 8))\n"
        "assert 'torch._dynamo.eval_frame' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_grad_fn_names_the_operation(device: str) -> None:
    assert "softmax" in str(onepass.softmax(torch.ones(2, 8, device=device, requires_grad=True)).grad_fn)


def test_forget_drops_the_plans(ordinary: Ordinary, device: str) -> None:
    softmax.kernels.FORWARD.forget()
    onepass.softmax(torch.randn(4, 16, device=device))
    assert ordinary.count == 1


def test_many_looks(device: str) -> None:
    """More than the table holds: it starts again, and everything stays right."""
    for columns in range(1, 4200):
        onepass.softmax(torch.ones(1, columns, device=device))
    for _ in range(SEEN + 1):
        assert torch.equal(onepass.softmax(torch.ones(1, 2, device=device)), torch.full((1, 2), 0.5, device=device))


def test_threads_share_plans(device: str) -> None:
    softmax.softmax.forget()
    wrong: list[int] = []

    def work(columns: int) -> None:
        x = torch.randn(5, columns, device=device)
        for _ in range(200):
            if not torch.allclose(onepass.softmax(x), torch.softmax(x, -1), atol=1e-5):
                wrong.append(columns)

    threads = [threading.Thread(target=work, args=(columns,)) for columns in (7, 8, 9, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_the_watching_thread_is_watched() -> None:
    launch = launches.Launch(1, (2,), None)
    with launches.watching() as seen:
        other = threading.Thread(target=launches.tell, args=(launch,))
        other.start()
        other.join()
        assert not seen
        launches.tell(launch)
    assert seen == [launch]
    launches.tell(launch)
    assert seen == [launch]
