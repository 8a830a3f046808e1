import pytest
import torch

from onepass.models.tokenizer import CharTokenizer


def test_round_trip():
    text = "être\n où? 你好 🙂"
    tokenizer = CharTokenizer.of_text(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens.tolist()) == text
    assert tokenizer.encode("").shape == (0,)


def test_beginning():
    assert CharTokenizer("ab\n").beginning == "\n"
    assert CharTokenizer("ba").beginning == "a"


def test_unknown_characters_are_named():
    tokenizer = CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"lacks 'z' \(U\+007A\), 'é' \(U\+00E9\); its 3 characters are 'abc'"):
        tokenizer.encode("abzéa")
    with pytest.raises(ValueError, match="and 2 more"):
        tokenizer.encode("0123456789")


def test_wrong_vocabularies():
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")
    with pytest.raises(ValueError, match="repeated: 'b'"):
        CharTokenizer("abcb")
