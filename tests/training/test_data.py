import hashlib
import http.client
import io
import urllib.error

import pytest
import torch

from onepass.training import data
from onepass.training.data import DataError, TextData, load_text, random_windows


def test_default_text_is_pythons_own(tmp_path):
    assert len(load_text(None, tmp_path)) > 100_000


def test_files(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("où?", encoding="utf-8")
    assert load_text(str(path), tmp_path) == "où?"
    path.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="not UTF-8 text: byte 2 is 0xff"):
        load_text(str(path), tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        load_text(str(path), tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        load_text(str(tmp_path / "none.txt"), tmp_path)


def test_split_and_windows():
    text = TextData.of_text("abcdefghij" * 10, 16)
    assert len(text.train) == 90
    assert len(text.validation) == 10
    inputs, targets = random_windows(text.train, 5, 16, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("length", [1, 10, 18])
def test_short_texts(length):
    with pytest.raises(DataError, match=f"has {length} characters, too few for a context of 16.*at least 20"):
        TextData.of_text("a" * length, 16)


def test_the_shortest_text_that_is_said_to_do():
    TextData.of_text("a" * 20, 16)
    with pytest.raises(DataError, match="at least 115"):
        TextData.of_text("ab" * 57, 102)
    TextData.of_text("a" * 115, 102)


def test_shakespeare_offline(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"could not be downloaded \(Name or service not known\). Without a network"):
        load_text("shakespeare", tmp_path)


def test_shakespeare_cut_short_while_it_is_downloaded(tmp_path, monkeypatch):
    def cut(url, timeout):
        raise http.client.IncompleteRead(b"First", 1_000_000)

    monkeypatch.setattr(data.urllib.request, "urlopen", cut)
    with pytest.raises(DataError, match=r"could not be downloaded \(IncompleteRead"):
        load_text("shakespeare", tmp_path)
    assert not list(tmp_path.iterdir())


def test_shakespeare_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"something else"))
    with pytest.raises(DataError, match=r"is not tinyshakespeare: sha256 .*; nothing was stored"):
        load_text("shakespeare", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(b"something else").hexdigest())
    assert load_text("shakespeare", tmp_path / "new") == "something else"
    assert (tmp_path / "new" / "tinyshakespeare.txt").read_bytes() == b"something else"
    (tmp_path / "new" / "tinyshakespeare.txt").write_bytes(b"cut")
    with pytest.raises(DataError, match="remove it, and it will be downloaded again"):
        load_text("shakespeare", tmp_path / "new")
