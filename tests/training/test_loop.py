"""Runs that stop, resume, fail: the numbers and the files they leave."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from onepass.models.weights import load_model
from onepass.training import loop
from onepass.training.checkpoint import CheckpointError, load_checkpoint
from onepass.training.loop import Progress, TrainConfig, learning_rate, train

CONFIG = TrainConfig(
    context=16, layers=1, heads=2, width=16, dropout=0.1, attention="auto", batch=4, steps=12, warmup=3, eval_every=4,
    eval_windows=8, grad_accum=2, sample=5,
)  # fmt: skip


class SignalAt(Progress):
    """Sends this process a signal when a step's numbers or a validation are shown."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def begin(self, trainer):
        original = trainer.train_step

        def train_step():
            if trainer.step == self.step:
                os.kill(os.getpid(), self.number)
            return original()

        trainer.train_step = train_step


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(CONFIG, out)
    return out


@pytest.mark.parametrize(
    ("step", "number"), [(0, signal.SIGTERM), (3, signal.SIGTERM), (5, signal.SIGINT), (7, signal.SIGTERM)]
)
def test_a_stopped_and_resumed_run_is_the_run_that_never_stopped(whole, tmp_path, step, number):
    result = train(CONFIG, tmp_path, progress=SignalAt(step, number))
    assert result.stopped_by == number
    assert result.step == step + 1
    assert train(CONFIG, tmp_path, resume=True).step == CONFIG.steps
    assert losses(tmp_path) == losses(whole)
    for (name, mine), theirs in zip(
        load_checkpoint(tmp_path / "checkpoint.pt")["model"].items(),
        load_checkpoint(whole / "checkpoint.pt")["model"].values(),
        strict=True,
    ):
        assert torch.equal(mine, theirs), name
    best, expected = (load_model(out / "best.safetensors") for out in (tmp_path, whole))
    assert best.record == expected.record
    assert all(torch.equal(a, b) for a, b in zip(best.model.parameters(), expected.model.parameters(), strict=True))


def test_a_signal_during_validation_saves_and_resumes(whole, tmp_path):
    class SignalInValidation(Progress):
        def begin(self, trainer):
            original = trainer.validate

            def validate(stop):
                if trainer.step == 8:
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(stop)

            trainer.validate = validate

    result = train(CONFIG, tmp_path, progress=SignalInValidation())
    assert result.stopped_by == signal.SIGTERM
    assert result.step == 8
    assert not [record for record in losses(tmp_path) if record["step"] == 8 and "validation_loss" in record]
    train(CONFIG, tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole)


def test_a_reader_that_goes_away_loses_nothing(whole, tmp_path):
    class Gone(Progress):
        def evaluation(self, step, loss, best):
            if step == 8:
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        train(CONFIG, tmp_path, progress=Gone())
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8
    train(CONFIG, tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole)


def test_what_cannot_train_is_said_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no backward"):
        train(replace(CONFIG, attention="flash"), out)
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        train(replace(CONFIG, device="cuda:99"), out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["auto", "cpu", "reference", "sdpa"])
def test_every_attention_with_a_backward_learns_the_same(tmp_path, name):
    def run(attention, **change):
        out = tmp_path / (attention + "".join(change))
        train(replace(CONFIG, attention=attention, dropout=0.0, **change), out)
        return [record["loss"] for record in losses(out) if "loss" in record]

    assert run(name) == pytest.approx(run("reference", sample=0), abs=1e-4)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_dropout_drops_the_same_with_every_backend(tmp_path, name):
    def validated(attention, dropout):
        out = tmp_path / f"{attention}-{dropout}"
        train(replace(CONFIG, attention=attention, dropout=dropout), out)
        return [record["loss"] for record in losses(out) if "loss" in record]

    dropped = validated("reference", 0.1)
    assert validated(name, 0.1) == pytest.approx(dropped, abs=1e-4)
    assert validated("reference", 0.0) != pytest.approx(dropped, abs=1e-4)


def test_bf16_through_our_kernels(tmp_path):
    train(replace(CONFIG, attention="auto", dropout=0.0, dtype="bf16"), tmp_path)
    found = [record["loss"] for record in losses(tmp_path) if "loss" in record]
    assert found[-1] < found[0]


def test_a_killed_run_resumes_from_its_last_checkpoint(whole, tmp_path):
    class Killed(Exception):
        pass

    class KillAt(Progress):
        def begin(self, trainer):
            original = trainer.train_step

            def train_step():
                if trainer.step == 7:
                    raise Killed
                return original()

            trainer.train_step = train_step

    with pytest.raises(Killed):
        train(CONFIG, tmp_path, progress=KillAt())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # later than the checkpoint, and cut off
    train(CONFIG, tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole)


def test_a_planted_fault_is_caught(whole, tmp_path):
    """Without the state of the dropout's random numbers the losses differ: the comparison above can fail."""
    train(CONFIG, tmp_path, progress=SignalAt(5))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state["cpu_random"] = torch.Generator().manual_seed(5).get_state()
    loop.save_checkpoint(tmp_path / "checkpoint.pt", state)
    train(CONFIG, tmp_path, resume=True)
    assert losses(tmp_path) != losses(whole)


def test_it_learns(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 100)
    result = train(replace(CONFIG, data=str(text), steps=60, lr=1e-2, dropout=0.0, eval_every=20), tmp_path / "run")
    assert result.best_loss < 1.0
    stored = load_model(tmp_path / "run" / "best.safetensors")
    assert stored.record["step"] == result.best_step
    assert stored.model.config.context == CONFIG.context


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    train(CONFIG, tmp_path, progress=SignalAt(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "metrics.jsonl"}

    def full(descriptor):
        if full.armed:
            raise OSError(28, "No space left on device")

    full.armed = False

    class FullDisk(Progress):
        def begin(self, trainer):
            full.armed = True

    monkeypatch.setattr("onepass.core.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device; the file that was there is unchanged"):
        train(CONFIG, tmp_path, resume=True, progress=FullDisk())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "metrics.jsonl"} == before


def test_other_runs_are_refused(whole, tmp_path):
    with pytest.raises(CheckpointError, match="of an earlier run: continue it with --resume"):
        train(CONFIG, whole)
    with pytest.raises(CheckpointError, match=r"no checkpoint .* to resume from"):
        train(CONFIG, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"lr was 0\.002 and is now 0\.001"):
        train(replace(CONFIG, lr=1e-3), whole, resume=True)
    text = tmp_path / "text.txt"
    text.write_text("another text " * 50)
    with pytest.raises(CheckpointError, match="was trained on another text"):
        train(replace(CONFIG, data=str(text)), whole, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        train(CONFIG, tmp_path, resume=True)


def test_signal_handlers_and_random_state_are_put_back(tmp_path):
    handlers, state = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], torch.get_rng_state()
    train(replace(CONFIG, steps=1), tmp_path)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.equal(torch.get_rng_state(), state)


def test_learning_rate():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps is 0"), ({"lr": 0.0}, "lr is 0.0"), ({"min_lr": 1.0}, "above"), ({"dtype": "fp8"}, "fp8"),
     ({"weight_decay": float("inf")}, "weight_decay is inf"), ({"grad_clip": float("nan")}, "grad_clip is nan"),
     ({"lr": float("inf")}, "lr is inf"), ({"seed": 2**63}, "seed is 9223372036854775808; expected a number of 64")],
)  # fmt: skip
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_a_diverged_run_stops_and_keeps_its_checkpoint(tmp_path):
    class Diverge(Progress):
        def begin(self, trainer):
            original = trainer.loss
            trainer.loss = lambda x, y: original(x, y) * (float("nan") if trainer.step >= 6 else 1.0)

    with pytest.raises(loop.DivergedError, match="the loss of step 7 is nan; the last checkpoint is from before it"):
        train(CONFIG, tmp_path, progress=Diverge())
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("eval_every", [1, 4])
def test_a_rate_far_too_high_keeps_the_last_good_checkpoint(tmp_path, eval_every):
    config = replace(CONFIG, lr=1e30, warmup=0, eval_every=eval_every)
    with pytest.raises(loop.DivergedError, match="try a lower --lr"):
        train(config, tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("what", ["validation loss", "gradient norm", "largest weight of tokens.weight"])
def test_a_diverged_number_is_never_saved(tmp_path, what):
    class Diverge(SignalAt):
        def begin(self, trainer):
            validate, train_step = trainer.validate, trainer.train_step
            if what == "validation loss":
                trainer.validate = lambda stop: float("nan") if trainer.step == 4 else validate(stop)

            def step():
                rate, loss, norm = train_step()
                if trainer.step == 4:
                    os.kill(os.getpid(), signal.SIGTERM) if what != "validation loss" else None
                    norm = norm * float("inf") if what == "gradient norm" else norm
                    if what.startswith("largest"):
                        trainer.model.tokens.weight.data[0, 0] = float("nan")
                return rate, loss, norm

            trainer.train_step = step

    with pytest.raises(loop.DivergedError, match=f"the {what} of step 4 is (nan|inf)"):
        train(CONFIG, tmp_path, progress=Diverge(4))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


def _without(state, name):
    del state[name]


def _reshaped(state):
    state["model"]["norm.weight"] = torch.zeros(3)


def _other_averages(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: _without(state, "model"), "lacks 'model', which a run needs to go on"),
        (lambda state: _without(state, "step"), "lacks 'step'"),
        (lambda state: state.update(step="two"), "has a str as 'step'"),
        (_reshaped, r"norm.weight of its model has shape \(3,\), expected shape \(16,\)"),
        (lambda state: state["model"].pop("norm.weight"), r"norm.weight of its model has no tensor"),
        (_other_averages, r"exp_avg of its optimizer has shape \(3,\), expected shape"),
        (lambda state: state.update(cpu_random=torch.zeros(3)), "random numbers of something else"),
        (lambda state: state.update(optimizer={}), "an optimizer or random numbers of something else"),
    ],
)
def test_checkpoints_with_other_contents_are_refused(whole, tmp_path, change, message):
    state = load_checkpoint(whole / "checkpoint.pt")
    change(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"{message}.*start anew in another --out") as raised:
        train(CONFIG, tmp_path, resume=True)
    assert str(tmp_path / "checkpoint.pt") in str(raised.value)


def test_files_of_another_kind_are_refused(whole, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"some text\n", bytes(range(256)), (whole / "best.safetensors").read_bytes(), b"PK\x03\x04no"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a file of another kind.*start anew") as raised:
            train(CONFIG, tmp_path, resume=True)
        assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ('{"step": 1, "loss": NaN}', "line 2 is not JSON .NaN is no JSON number"),
        ('{"loss": 1.0}', "line 2 is not an object with a whole number 'step'"),
        ("[1]", "line 2 is not an object"),
    ],
)
def test_bad_metrics_are_named_on_resume(whole, tmp_path, line, message):
    (tmp_path / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    before = '{"step": 0, "validation_loss": 3.0}\n' + line + "\n"
    (tmp_path / "metrics.jsonl").write_text(before)
    with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
        train(CONFIG, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
