"""The training loop: windows of text in, a model, its checkpoints and its metrics out.

A run's folder holds ``checkpoint.pt`` (what the next step depends on), ``best.safetensors`` (the weights with the
lowest validation loss so far, bf16), ``metrics.jsonl`` and ``losses.png``. A run that is stopped and resumed goes
through the same numbers, bit for bit, as one that never stopped (on one machine, with the same number of threads; on a
GPU as far as its attention's backward is deterministic).
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onepass.core import device
from onepass.generation import SampleConfig, generate
from onepass.models.attention import AttentionChoice
from onepass.models.gpt import GPT, GPTConfig
from onepass.models.weights import save_model
from onepass.training.checkpoint import ADVICE, CheckpointError, load_checkpoint, require_shapes, save_checkpoint
from onepass.training.data import TextData, load_text, random_windows
from onepass.training.evaluation import position_losses, spread_starts
from onepass.training.interrupt import StopRequest
from onepass.training.metrics import MetricsLog

__all__ = [
    "DivergedError",
    "Progress",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "learning_rate",
    "saved_config",
    "train",
]

LOG_EVERY = 10  # steps between two lines of metrics; on a GPU also between two waits for it
FREE_ON_RESUME = ("data", "data_dir", "device", "sample")  # the text itself is compared by its sha256


class DivergedError(ValueError):
    """A loss, a gradient's norm or a weight is no longer a finite number; no checkpoint was written from it."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on."""

    data: str | None = None
    data_dir: str = "data"
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0
    bias: bool = False
    attention: str = "auto"
    batch: int = 16
    steps: int = 1000
    lr: float = 2e-3
    min_lr: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    grad_accum: int = 1
    eval_every: int = 250
    eval_windows: int = 64
    dtype: str = "fp32"
    seed: int = 1337
    device: str = "cpu"
    compile: bool = False
    sample: int = 200

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "grad_accum", "eval_every", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("lr", "min_lr", "weight_decay", "grad_clip", "dropout"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number")
        for name in ("warmup", "min_lr", "weight_decay", "grad_clip", "sample"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.lr <= 0.0:
            raise ValueError(f"lr is {self.lr}; expected a positive number")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; expected a number of 64 bits, -2**63 to 2**63 - 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype is {self.dtype!r}; expected 'fp32' or 'bf16'")
        self.model(vocab_size=1)

    def model(self, vocab_size: int) -> GPTConfig:
        names = ("context", "layers", "heads", "width", "dropout", "bias", "attention")
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. ``stopped_by`` is the signal that ended it early, after a checkpoint was written."""

    step: int
    best_loss: float
    best_step: int
    tokens_per_second: float
    stopped_by: signal.Signals | None


class Progress:
    """What a run tells while it runs. This one says nothing; a command line overrides what it shows."""

    def begin(self, trainer: Trainer) -> None:
        """The model is built and the text is read; ``trainer.step`` is not 0 when the run is resumed."""

    def steps(self, step: int, loss: float, tokens_per_second: float) -> None:
        """``step`` steps are done; ``loss`` is the last one's."""

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        """The model was validated."""

    def sample(self, text: str) -> None:
        """What the model writes now."""

    def end(self) -> None:
        """No more steps, for whatever reason."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of ``step`` (from 0): a linear warm-up to ``lr``, then half a cosine down to ``min_lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))) * (config.lr - config.min_lr)


class Trainer:
    """A run in memory: model, optimizer, text and the random numbers to come."""

    def __init__(self, config: TrainConfig, data: TextData) -> None:
        self.config, self.data = config, data
        self.device = device.named(config.device)
        _check_attention(config, self.device)
        torch.manual_seed(config.seed)
        self.model = GPT(config.model(len(data.tokenizer))).to(self.device)
        self.optimizer = _adamw(self.model, config, self.device)
        self.data_order = torch.Generator().manual_seed(config.seed)
        self.train_tokens = data.train.to(self.device)
        self.validation_tokens = data.validation.to(self.device)
        self.loss = torch.compile(self._loss, dynamic=False) if config.compile else self._loss
        self.step = 0
        self.evaluated_at = -1
        self.best_loss, self.best_step = float("inf"), 0

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch * self.config.context * self.config.grad_accum

    def evaluation_due(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.steps

    def train_step(self) -> tuple[float, Tensor, Tensor]:
        """One step of the optimizer: its learning rate, mean loss and gradient norm (the last two on the device)."""
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for _ in range(config.grad_accum):
            inputs, targets = random_windows(self.train_tokens, config.batch, config.context, self.data_order)
            loss = self.loss(inputs, targets) / config.grad_accum
            loss.backward()
            total += loss.detach()
        limit = config.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return rate, total, norm

    def validate(self, stop: StopRequest) -> float | None:
        """The mean loss on the last tenth; None when a signal came meanwhile."""
        starts, length = spread_starts(self.validation_tokens, self.config.context, self.config.eval_windows)
        with self._autocast():
            losses = position_losses(
                self.model, self.validation_tokens, starts, length, batch=self.config.batch, should_stop=stop.requested
            )
        return None if losses is None else float(losses.mean())

    def sample(self) -> str:
        """What the model writes now, after a line feed (or the vocabulary's first character)."""
        tokenizer = self.data.tokenizer
        config = SampleConfig(tokens=min(self.config.sample, self.config.context), seed=self.config.seed)
        self.model.eval()
        try:
            return tokenizer.decode(generate(self.model, tokenizer.encode(tokenizer.beginning).to(self.device), config))
        finally:
            self.model.train()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "config": dataclasses.asdict(self.config),
            "text_sha256": self.data.sha256,
            "characters": self.data.tokenizer.characters,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data_order": self.data_order.get_state(),
            "cpu_random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Goes on from ``state``. Raises :class:`CheckpointError` when it is of another run."""
        mine = dataclasses.asdict(self.config)
        differing = [
            f"{name} was {state['config'].get(name)!r} and is now {value!r}"
            for name, value in mine.items()
            if name not in FREE_ON_RESUME and state["config"].get(name) != value
        ]
        if differing:
            raise CheckpointError(f"{path} is of another run: {'; '.join(differing)}; resume with its own settings")
        if state["text_sha256"] != self.data.sha256:
            theirs = state["text_sha256"]
            raise CheckpointError(f"{path} was trained on another text: sha256 {theirs}, now {self.data.sha256}")
        require_shapes(path, "model", state["model"], self.model.state_dict())
        self.model.load_state_dict(state["model"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.data_order.set_state(state["data_order"])
            torch.set_rng_state(state["cpu_random"])
            if self.device.type == "cuda" and state["device_random"] is not None:
                torch.cuda.set_rng_state(state["device_random"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} holds an optimizer or random numbers of something else ({error}): {ADVICE}"
            ) from error
        for parameter, averages in self.optimizer.state.items():
            expected = {name: parameter for name in averages if name != "step"}
            require_shapes(path, "optimizer", {name: averages[name] for name in expected}, expected)
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")


def train(config: TrainConfig, out: Path, *, resume: bool = False, progress: Progress | None = None) -> TrainResult:
    """Trains a GPT and leaves it in the folder ``out``.

    With ``resume`` it continues from ``out/checkpoint.pt``; without, a folder that holds one already is refused.
    Raises ``ValueError`` for a device that is not there or an attention that cannot train this model on it,
    :class:`~onepass.training.data.DataError` for a text that cannot be used,
    :class:`~onepass.training.checkpoint.CheckpointError` for a checkpoint of another run, ``OSError`` when the disk is
    full (the previous checkpoint is whole), and ``DivergedError`` when the loss, the gradient or a weight is no longer
    finite (the previous checkpoint stays).
    """
    progress = progress or Progress()
    checkpoint = out / "checkpoint.pt"
    if not resume and checkpoint.exists():
        raise CheckpointError(f"{checkpoint} is of an earlier run: continue it with --resume, or choose another --out")
    saved = load_checkpoint(checkpoint) if resume else None
    data = TextData.of_text(load_text(config.data, Path(config.data_dir)), config.context)
    target = device.named(config.device)
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        trainer = Trainer(config, data)
        if saved is not None:
            trainer.load_state(saved, checkpoint)
        out.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(out / "metrics.jsonl", keep_steps=trainer.step if resume else None)
        progress.begin(trainer)
        try:
            with StopRequest() as stop:
                return _run(trainer, out, log, stop, progress)
        finally:
            progress.end()


def saved_config(out: Path) -> TrainConfig:
    """The settings of the run whose checkpoint is in ``out``."""
    path = out / "checkpoint.pt"
    state = load_checkpoint(path)
    try:
        return TrainConfig(**state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has unusable settings: {error}") from error


def _run(trainer: Trainer, out: Path, log: MetricsLog, stop: StopRequest, progress: Progress) -> TrainResult:
    config = trainer.config
    pending: list[tuple[int, float, Tensor, Tensor]] = []  # steps whose numbers are still on the device
    speed, began, first_step = 0.0, time.perf_counter(), trainer.step
    trainer.model.train()
    while True:
        if trainer.evaluation_due() and trainer.evaluated_at != trainer.step and not stop.requested():
            _evaluate(trainer, out, log, stop, progress)
            began, first_step = time.perf_counter(), trainer.step
        if stop.requested() or trainer.step >= config.steps:
            break
        rate, loss, norm = trainer.train_step()
        pending.append((trainer.step, rate, loss, norm))
        if len(pending) >= LOG_EVERY or trainer.evaluation_due() or stop.requested():
            records = _records(pending)
            speed = (trainer.step - first_step) * trainer.tokens_per_step / (time.perf_counter() - began)
            records[-1]["tokens_per_second"] = round(speed, 1)
            log.write(records)
            progress.steps(trainer.step, records[-1]["loss"], speed)
            pending.clear()
    if stop.requested():
        _save(trainer, out)
    return TrainResult(trainer.step, trainer.best_loss, trainer.best_step, speed, stop.signal)


def _evaluate(trainer: Trainer, out: Path, log: MetricsLog, stop: StopRequest, progress: Progress) -> None:
    loss = trainer.validate(stop)
    if loss is None:
        return
    _require_finite("validation loss", trainer.step, loss)
    trainer.evaluated_at = trainer.step
    best = loss < trainer.best_loss
    if best:
        trainer.best_loss, trainer.best_step = loss, trainer.step
        record = {"step": trainer.step, "validation_loss_when_trained": loss}
        save_model(out / "best.safetensors", trainer.model, trainer.data.tokenizer, record)
    log.write([{"step": trainer.step, "validation_loss": loss}])
    _save(trainer, out)  # before anything is shown: the reader may have gone
    progress.evaluation(trainer.step, loss, best)
    if trainer.config.sample and not stop.requested():
        progress.sample(trainer.sample())


def _records(pending: list[tuple[int, float, Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Brings the numbers of several steps to the host at once."""
    numbers = torch.stack([torch.stack([loss.float(), norm.float()]) for _, _, loss, norm in pending]).tolist()
    records = []
    for (step, rate, _, _), (loss, norm) in zip(pending, numbers, strict=True):
        _require_finite("loss", step, loss)
        _require_finite("gradient norm", step, norm)
        records.append({"step": step, "loss": loss, "lr": rate, "grad_norm": norm})
    return records


def _require_finite(what: str, step: int, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"the {what} of step {step} is {value}; the last checkpoint is from before it: try a lower --lr"
        )


def _save(trainer: Trainer, out: Path) -> None:
    """Writes the checkpoint, or leaves the previous one as it is when a weight is not finite."""
    for name, parameter in trainer.model.named_parameters():
        _require_finite(f"largest weight of {name}", trainer.step, parameter.detach().abs().max().item())
    save_checkpoint(out / "checkpoint.pt", trainer.state())


def _check_attention(config: TrainConfig, target: torch.device) -> None:
    """Raises ``ValueError`` when this attention cannot train this model here: before the run, not in its first step."""
    model = config.model(vocab_size=1)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    queries = torch.zeros(1, 1, model.heads, model.head_dim, dtype=dtype, device=target)
    AttentionChoice(model.attention).check_training(queries, model.dropout)


def _adamw(model: nn.Module, config: TrainConfig, target: torch.device) -> torch.optim.AdamW:
    """AdamW whose decay is decoupled and spares vectors (norms and biases)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=target.type == "cuda")
