"""Text for training: where it comes from, and the windows that are cut from it."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onepass.core.files import replace_file
from onepass.models.tokenizer import CharTokenizer

__all__ = ["DataError", "TextData", "load_text"]

SHAKESPEARE_NAME = "tinyshakespeare.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_SECONDS = 30


class DataError(ValueError):
    """A text that cannot be had or cannot be trained on. The message says what to do."""


@dataclass(frozen=True)
class TextData:
    """A text as tokens: the first nine tenths to train on, the last tenth to validate with."""

    tokenizer: CharTokenizer
    train: Tensor
    validation: Tensor
    sha256: str

    @classmethod
    def of_text(cls, text: str, context: int) -> TextData:
        """Splits ``text``. Raises :class:`DataError` when it is too short for windows of ``context`` tokens."""
        if not text:
            raise DataError("the text is empty: nothing to train on")
        split = len(text) * 9 // 10
        needed = -(-(context + 1) * 10 // 9)
        if split < context + 1 or len(text) - split < 2:
            raise DataError(
                f"the text has {len(text)} characters, too few for a context of {context}: training on its first nine "
                f"tenths needs at least {max(needed, 20)}; give a longer text or a smaller --context"
            )
        tokenizer = CharTokenizer.of_text(text)
        tokens = tokenizer.encode(text)
        sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(tokenizer, tokens[:split], tokens[split:], sha256)


def load_text(source: str | None, data_dir: Path) -> str:
    """The text named by ``source``.

    None is the text of Python's own help topics, which every installation carries; ``shakespeare`` is
    ``tinyshakespeare.txt`` in ``data_dir``, downloaded there when absent; anything else is the path of a UTF-8 file.
    """
    if source is None:
        return _python_topics()
    if source == "shakespeare":
        return _shakespeare(data_dir)
    path = Path(source)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; give --data a UTF-8 text file, or 'shakespeare'") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not text:
        raise DataError(f"{path} is empty: nothing to train on")
    return text


def _python_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python was installed without pydoc_data, the default text; give --data a UTF-8 text file"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def _shakespeare(data_dir: Path) -> str:
    path = data_dir / SHAKESPEARE_NAME
    if path.exists():
        data = path.read_bytes()
        _check_shakespeare(data, str(path), f"remove it, and it will be downloaded again from {SHAKESPEARE_URL}")
        return data.decode()
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_SECONDS) as response:
            data = response.read()
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{SHAKESPEARE_NAME} is not in {data_dir} and could not be downloaded ({reason}). Without a network: copy "
            f"{SHAKESPEARE_URL} to {path}, or leave --data out to train on text that Python itself carries"
        ) from error
    _check_shakespeare(data, SHAKESPEARE_URL, f"nothing was stored; put the right file at {path}")
    data_dir.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
    return data.decode()


def _check_shakespeare(data: bytes, where: str, advice: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(f"{where} is not tinyshakespeare: sha256 {found}, expected {SHAKESPEARE_SHA256}; {advice}")


def random_windows(tokens: Tensor, count: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` windows at random places of ``tokens`` (n,): inputs and targets, int64 (count, context) each.

    The places come from ``generator``, on the CPU, so the order of the data is the same on every device.
    """
    starts = torch.randint(tokens.numel() - context, (count,), generator=generator)
    return windows_at(tokens, starts, context)


def windows_at(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The windows that begin at ``starts`` (count,): inputs, and targets one token further, (count, context) each."""
    starts = starts.to(tokens.device, non_blocking=True)
    places = starts[:, None] + torch.arange(context + 1, device=tokens.device)
    windows = tokens[places]
    return windows[:, :-1], windows[:, 1:]
