"""`onepass generate` and `onepass train gpt` as processes: lines, exit codes, signals, pipes, full disks."""

import json
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from onepass import cli
from onepass.commands import train as train_command
from onepass.models.attention import ATTENTION_NAMES

COMMAND = [sys.executable, "-m", "onepass"]
TINY = (  # noqa: SIM905
    "--context 16 --layers 1 --heads 2 --width 16 --batch 4 --steps 12 --warmup 3 --eval-every 4 --eval-windows 8 "
    "--sample 5 --data text.txt"
).split()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In this process and those that it starts: the models are tiny, and the machine may have other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in, but for a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat; the dog did not. " * 100)
    return tmp_path


def invoke(*args):
    return CliRunner().invoke(cli.cli, list(args))


def onepass(*args, **options):
    """The command in a process of its own."""
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=300, check=False, **options)


def start(*args, stderr=subprocess.STDOUT):
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=stderr, text=True)


def message_of(args, capsys):
    """What a user reads of an error, in one line."""
    with pytest.raises(SystemExit) as error:
        cli.main(list(args))
    assert error.value.code in (1, 2)
    return re.sub(r"\s*[│|]?\s+[│|]?\s*", " ", capsys.readouterr().err)


def steps_logged(out):
    """The losses in the metrics, by step. A run that is still going may be in the middle of its last line."""
    text = (out / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_generate_with_every_attention(name):
    tiles = ("-br", "128", "-bc", "512") if name in ("naive", "blocked", "fused", "flash") else ()
    done = invoke("generate", "-m", "shakes128", "--tokens", "20", "--attention", name, *tiles)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("number of parameters: 0.80M\n")
    assert re.search(rf"20 characters in [\d.]+ s: [\d,]+ tokens/s \(attention {name}, KV cache\)\n$", done.output)


def test_generate_writes_as_many_characters_as_its_models_name_says():
    cached, uncached = invoke("generate", "-m", "shakes128"), invoke("generate", "-m", "shakes128", "--no-cache")
    text = cached.output.split("\n", 1)[1].rsplit("\n\n", 1)[0]
    assert len(text) == 1 + 128  # the prompt is a line feed
    assert uncached.output.split("\n", 1)[1].rsplit("\n\n", 1)[0] == text
    assert "(attention auto, no cache)" in uncached.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("-m", "shakes64"),
            r"'shakes64' is neither one of shakes128, shakes256, shakes1024, shakes2048 nor a model file",
        ),
        (("--prompt", "où"), r"the vocabulary lacks 'ù' \(U\+00F9\)"),
        (("--prompt", ""), r"at least one character"),
        (("--attention", "fast"), r"'fast' is not one of"),
        (("-br", "64"), r"block_q and block_k set the tiles of the lab steps"),
        (("--temperature", "-1"), r"temperature is -1\.0; expected a finite number, 0 or more"),
        (("--device", "cuda:99"), r"device 'cuda:99' is not there"),
    ],
)
def test_generate_says_what_is_wrong(folder, capsys, args, message):
    assert re.search(message, message_of(["generate", *args], capsys))


def test_generate_into_a_pipe_that_closes_early():
    process = start("generate", "-m", "shakes2048", stderr=subprocess.PIPE)
    assert process.stdout.readline() == "number of parameters: 0.80M\n"
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_train_prints_what_it_does_and_exports(folder):
    done = onepass("train", "gpt", *TINY, "--export", "model.safetensors")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "number of parameters: 0.00M"
    assert lines[1].startswith("text: ")
    assert re.search(
        r"^step 12: validation loss \d\.\d{4}( \(best\))?, training loss \d\.\d{4}, [\d,]+ tokens/s$", done.stdout, re.M
    )
    assert re.search(r"^best validation loss \d\.\d{4} at step \d+; ", done.stdout, re.M)
    assert lines[-1].startswith("exported model.safetensors (")
    assert sorted(path.name for path in (folder / "runs/gpt").iterdir()) == [
        "best.safetensors", "checkpoint.pt", "losses.png", "metrics.jsonl",
    ]  # fmt: skip
    assert (folder / "runs/gpt/losses.png").read_bytes().startswith(b"\x89PNG")
    written = onepass("generate", "-m", "model.safetensors", "--tokens", "30")
    assert written.returncode == 0, written.stderr
    again = onepass("train", "gpt", *TINY)
    assert again.returncode == 2
    assert "of an earlier run: continue it with --resume, or choose another --out" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_saves_on_a_signal_and_resumes_with_its_own_settings(folder, number):
    long = [*TINY, "--steps", "100000", "--eval-every", "20", "--sample", "0"]
    process = start("train", "gpt", *long)
    out = folder / "runs/gpt"
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() or not (out / "metrics.jsonl").exists() or not steps_logged(out):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, printed
    found = re.search(rf"stopped by {number.name} after step (\d+); saved in runs/gpt: --resume continues", printed)
    stopped = int(found[1])
    before = steps_logged(out)
    assert max(before) == stopped

    # Its learning rates belong to 100000 steps: another number is another run, and is said to be.
    refused = onepass("train", "gpt", "--resume", "--steps", str(stopped + 5))
    assert refused.returncode == 2
    assert f"steps was 100000 and is now {stopped + 5}" in refused.stderr

    process = start("train", "gpt", "--resume")
    while max(steps_logged(out)) <= stopped:
        assert time.monotonic() < deadline + 120
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert f"resumed at step {stopped}" in printed
    after = steps_logged(out)
    assert {step: after[step] for step in before} == before


def test_train_on_a_full_disk_keeps_the_checkpoint(folder):
    """A limit on the size of files stands in for the disk: a write fails half-way, as on a full one."""
    assert onepass("train", "gpt", *TINY, "--out", "full").returncode == 0
    checkpoint = folder / "full" / "checkpoint.pt"
    weights = (folder / "full" / "best.safetensors").stat().st_size
    first = onepass("train", "gpt", *TINY, "--out", "new", preexec_fn=lambda: limit_files(weights + 1000))
    assert first.returncode == 2
    assert re.search(r"could not write new/checkpoint\.pt: File too large; nothing was left behind", first.stderr)
    assert "checkpoint.pt" not in "".join(path.name for path in (folder / "new").iterdir())

    stopped = folder / "full"
    before = checkpoint.read_bytes()
    shorter = [*TINY, "--export", "model.safetensors"]
    exported = onepass(
        "train", "gpt", *shorter, "--resume", "--out", "full", preexec_fn=lambda: limit_files(weights // 2)
    )
    assert exported.returncode == 2
    assert "could not write" in exported.stderr
    assert "Traceback" not in exported.stderr
    assert checkpoint.read_bytes() == before
    assert not [path for path in (*folder.iterdir(), *stopped.iterdir()) if "partial" in path.name]


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_train_into_a_pipe_that_closes_early(folder):
    process = start("train", "gpt", *TINY, "--steps", "100000", stderr=subprocess.PIPE)
    while "step 0" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert (folder / "runs/gpt/checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "none.txt"), "there is no file none.txt"),
        (("--data", "short.txt"), "too few for a context of 16"),
        (("--attention", "flash"), "'flash' has no backward"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("--resume",), "there is no checkpoint runs/gpt/checkpoint.pt to resume from"),
        (("--export", "no/model.safetensors"), "there is no folder"),
        (("--heads", "3"), "width 16 is not divisible by heads 3"),
    ],
)
def test_train_says_what_is_wrong(folder, capsys, args, message):
    (folder / "short.txt").write_text("a" * 10)
    assert message in message_of(["train", "gpt", *TINY, *args], capsys)
    assert not (folder / "runs").exists()


def test_a_full_disk_takes_the_picture_alone(tmp_path, monkeypatch, capsys):
    def full(metrics, picture):
        raise OSError(28, f"could not write {picture}: No space left on device")

    monkeypatch.setattr(train_command, "draw_losses", full)
    train_command._draw(tmp_path, Console(width=400))
    assert "No space left on device" in capsys.readouterr().out
