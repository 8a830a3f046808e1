"""Characters as tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["CharTokenizer"]


class CharTokenizer:
    """One token per character; token ``i`` is ``characters[i]``, in the order of their code points."""

    def __init__(self, characters: str) -> None:
        if not characters:
            raise ValueError("a vocabulary needs at least one character; got an empty text")
        self.characters = "".join(sorted(set(characters)))
        if len(self.characters) != len(characters):
            repeated = sorted({c for c in characters if characters.count(c) > 1})
            raise ValueError(f"a vocabulary lists each character once; repeated: {_describe(repeated)}")
        self._codes = _code_points(self.characters)

    @classmethod
    def of_text(cls, text: str) -> CharTokenizer:
        """The vocabulary of all characters that ``text`` has."""
        return cls("".join(sorted(set(text))))

    @property
    def beginning(self) -> str:
        """A character for a text to begin after: a line feed, or the first of a vocabulary that has none."""
        return "\n" if "\n" in self.characters else self.characters[0]

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Tokens, int64 (len(text),). Raises ``ValueError`` that names characters which the vocabulary lacks."""
        if not text:
            return torch.empty(0, dtype=torch.int64)
        codes = _code_points(text)
        tokens = torch.searchsorted(self._codes, codes).clamp_(max=len(self) - 1)
        if not torch.equal(self._codes[tokens], codes):
            missing = sorted(set(text) - set(self.characters))
            raise ValueError(
                f"the vocabulary lacks {_describe(missing)}; its {len(self)} characters are {self.characters!r}"
            )
        return tokens

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """The text of ``tokens``."""
        if isinstance(tokens, Tensor):
            tokens = tokens.tolist()
        return "".join(self.characters[token] for token in tokens)


def _code_points(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)


def _describe(characters: list[str], limit: int = 8) -> str:
    named = [f"{c!r} (U+{ord(c):04X})" for c in characters[:limit]]
    rest = len(characters) - limit
    return ", ".join(named) + (f" and {rest} more" if rest > 0 else "")
