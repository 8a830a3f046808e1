"""The first call of a process: each call by itself, and the folders that new processes get."""

import json
import subprocess

import pytest

import onepass
from onepass.bench import registry, run
from onepass.ops.attention.bench import first_call


@pytest.mark.parametrize("name", first_call.CALLS)
def test_calls_are_timed_and_checked(name, seed):
    found = first_call.measure(name, "onepass-cpu", "cpu", seed)
    assert found["seconds"] > 0
    assert 0 < found["error"] <= 1


def test_new_processes_tell_seconds_and_errors():
    call = first_call.FirstCall("decode", "onepass-cpu", "cpu", None)
    assert 0 < call.error() <= 1
    first, second = call(), call()
    assert min(first, second) > 0
    assert first != second


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", first_call.CALLS)
def test_first_calls_on_a_gpu(name):
    for warm in (False, True):
        row = run.run_case(first_call.GROUP, first_call.case(name, warm), run.Settings(repeats=2))
        assert row["absent"] == {}
        assert all(len(sample["seconds"]) == 2 for sample in row["samples"].values())


@pytest.fixture
def processes(monkeypatch):
    """The folders of Triton's cache that processes were started with; each takes a second more than the one before."""
    folders = []

    def start(command, **options):
        env = dict(word.split("=", 1) for word in command[1 : 1 + len(first_call.FOLDERS)])
        assert {env[name].rpartition("/")[0] for name in first_call.FOLDERS} == {
            env["TRITON_CACHE_DIR"].rpartition("/")[0]
        }
        folders.append(env["TRITON_CACHE_DIR"])
        told = json.dumps({"seconds": float(len(folders)), "error": 0.5})
        return subprocess.CompletedProcess(command, 0, stdout=f"a warning\n{told}\n", stderr="")

    monkeypatch.setattr(first_call.subprocess, "run", start)
    return folders


def test_caches_are_empty_at_every_call_or_kept(processes, tmp_path):
    cold = first_call.FirstCall("forward", "onepass-cpu", "cpu", None)
    assert (cold.error(), cold(), cold()) == (0.5, 1.0, 2.0)  # the process that told the error had no cache either
    assert len(set(processes)) == 2
    warm = first_call.FirstCall("forward", "onepass-cpu", "cpu", tmp_path)
    assert (warm.error(), warm(), warm()) == (0.5, 4.0, 5.0)
    assert len(set(processes[2:])) == 1


def test_a_group_is_measured_by_what_its_calls_return(processes, monkeypatch):
    cases = [first_call.case("forward", warm=warm) for warm in (False, True)]
    row = run.run_case(first_call.GROUP, cases[0], run.Settings())
    assert row["samples"]["onepass-triton"] == {"calls": 1, "seconds": [1.0, 4.0, 5.0]}
    assert set(row["samples"]) == {"onepass-triton", first_call.FLEX}
    assert row["bars"] == {"seconds": 5.0}
    processes.clear()
    row = run.run_case(first_call.GROUP, cases[1], run.Settings())
    assert row["bars"] == {}
    assert set(row["samples"]) == {"onepass-triton"}
    assert len(set(processes)) == 1


def test_a_process_that_fails_is_told(monkeypatch):
    with pytest.raises(RuntimeError, match=r"the first call of no such call by onepass-cpu on cpu failed: .*no such"):
        first_call.FirstCall("no such call", "onepass-cpu", "cpu", None)()
    call = first_call.FirstCall("forward", "onepass-cpu", "cpu", None)
    monkeypatch.setattr(first_call, "_CHILD", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit status 3"):
        call()
    monkeypatch.setattr(first_call, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(first_call, "TIMEOUT", 0.1)
    with pytest.raises(RuntimeError, match=r"more than 0\.1 seconds"):
        call()


def test_a_call_that_ours_refuses_is_skipped(monkeypatch, capsys):
    def refuses(provider, device):
        raise onepass.UnsupportedError("attention: no backend can do this\n  cpu: not today\n  triton: no GPU")

    monkeypatch.setattr(first_call, "CALLS", {"forward": (refuses, ())})
    first_call.main(["forward", "onepass-cpu", "cpu", "0"])
    told = capsys.readouterr().out.strip()
    monkeypatch.setattr(first_call, "_CHILD", f"print({told!r})")
    case = first_call.case("forward", warm=False)
    with pytest.raises(registry.SkippedError, match=r"^cpu: not today$"):
        run.run_case(first_call.GROUP, case, run.Settings())
