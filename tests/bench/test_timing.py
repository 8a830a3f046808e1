"""The three clocks: what they count, and what they leave out."""

from types import SimpleNamespace

import pytest
import torch

from onepass.bench import timing


class Queue:
    """A GPU that is not there: what is enqueued, in order, and events that read a counter of its own time."""

    def __init__(self, monkeypatch):
        self.entries, self.now = [], 0.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.entries.append("synchronize"))
        monkeypatch.setattr(timing, "FLUSH_BYTES", 64)

    def sleep(self, cycles):
        self.entries.append("sleep")
        self.now += cycles / timing.CYCLES_PER_SECOND
        self.cycles = cycles

    def kernel(self, name, seconds):
        def call():
            self.entries.append(name)
            self.now += seconds

        return call


class Event:
    def __init__(self, queue):
        self.queue = queue

    def record(self):
        self.queue.entries.append("event")
        self.at = self.queue.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def queue(monkeypatch):
    return Queue(monkeypatch)


def test_device_time_is_that_of_the_call_alone(queue):
    clock = timing.DeviceClock(1e-3, "cpu")
    call, reset = queue.kernel("call", 1e-4), queue.kernel("reset", 5e-4)
    calls = clock.calls(call, reset)
    assert calls in (10, 11)  # a millisecond of calls of a tenth
    queue.entries.clear()
    assert clock.sample(call, reset, 2) == pytest.approx(1e-4)
    assert queue.entries == ["reset", "sleep", "event", "call", "event"] * 2 + ["synchronize"]


def test_caches_are_cold_before_each_call(queue):
    clock = timing.DeviceClock(1e-3, "cpu")
    found = []

    def call():
        found.append(int(clock.flushed.count_nonzero()))
        clock.flushed.fill_(1)

    clock.calls(call, None)
    found.clear()
    clock.sample(call, None, 3)
    assert found == [0, 0, 0]


@pytest.mark.parametrize(("seconds", "calls"), [(1e-7, 25), (1.0, 3)])
def test_device_calls_are_bounded(queue, seconds, calls):
    assert timing.DeviceClock(1e-3, "cpu").calls(queue.kernel("call", seconds), None) == calls


@pytest.fixture
def host(monkeypatch):
    """The host's clock, which moves by what it sleeps alone."""
    clock = SimpleNamespace(now=0.0)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_device_sleeps_while_the_host_launches(queue, host):
    clock = timing.DeviceClock(1e-3, "cpu")
    clock.calls(lambda: host.sleep(0.001), None)
    assert 1.8e-3 <= queue.cycles / timing.CYCLES_PER_SECOND <= timing.SLEEP_SECONDS[1]


def test_host_time_lets_the_queue_run_empty_untimed(queue, host, monkeypatch):
    monkeypatch.setattr(timing, "HOST_BATCH", 2)
    clock = timing.HostClock(1e-3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (queue.entries.append("synchronize"), host.sleep(0.01)))
    call = queue.kernel("call", 0.0)
    seconds = clock.sample(lambda: (call(), host.sleep(0.001)), None, 5)
    assert queue.entries == ["call", "call", "synchronize"] * 2 + ["call", "synchronize"]
    assert seconds == pytest.approx(0.001)


def test_wall_time_leaves_out_what_restores_inputs(host):
    clock = timing.WallClock(0.005)
    assert clock.sample(lambda: host.sleep(0.001), lambda: host.sleep(0.01), 2) == pytest.approx(0.001)


def test_each_provider_is_restored_before_its_own_calls():
    order = []
    providers = {name: lambda name=name: order.append(name) for name in "ab"}
    timing.interleaved(providers, 2, timing.WallClock(1e-9), resets={"b": lambda: order.append("reset b")})
    assert order[-6:] == ["a", "reset b", "b", "reset b", "b", "a"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_clock_agrees_with_the_bytes_moved():
    x = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    clock = timing.DeviceClock(2e-3)
    call = lambda: y.copy_(x)  # noqa: E731
    gbps = 1e-9 * 2 * x.nbytes / clock.sample(call, None, clock.calls(call, None))
    assert 100 < gbps < 20000


def test_calls_that_time_themselves():
    seconds = iter([2.0, 3.0])
    assert timing.OwnClock().calls(lambda: 1 / 0, None) == 1
    samples = timing.interleaved({"ours": lambda: next(seconds)}, 2, timing.OwnClock())
    assert samples["ours"].seconds == [2.0, 3.0]
    resets = []
    timing.OwnClock().sample(lambda: 1.0, lambda: resets.append(1), 1)
    assert resets == [1]
    with pytest.raises(TypeError, match="returns its seconds, not None"):
        timing.OwnClock().sample(lambda: None, None, 1)
