"""`onepass steps`: the table, the picture, the exit status."""

import json

import pytest
import torch

click_testing = pytest.importorskip("click.testing")
pytest.importorskip("matplotlib")

from onepass.commands.steps import command  # noqa: E402
from onepass.lab import STEPS, bench  # noqa: E402

SMALL = ["--seqlen", "40", "--head-dim", "8", "--heads", "2", "--repeats", "2", "--threads", "2"]


def run(*arguments: object):
    return click_testing.CliRunner().invoke(command, [*SMALL, *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("options", [(), ("--causal", "-br", 7, "-bc", 13)])
def test_shows_all_and_draws(tmp_path, suffix, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    threads = torch.get_num_threads()
    picture = tmp_path / "folder" / f"steps{suffix}"
    done = run("--out", picture, *options)
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in (*STEPS, *bench.PYTORCH))
    assert torch.get_num_threads() == threads
    assert picture.stat().st_size > 1000
    result = json.loads(picture.with_suffix(".json").read_text())
    assert result["problem"]["causal"] is bool(options)
    for step in STEPS:
        row = result["contenders"][step]
        assert row["error_in_budgets"] <= 1.0
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["gflops"] == pytest.approx(1e-9 * result["flops"] / row["seconds"]["median"])
        assert row["working_memory"] > 0


def test_a_wrong_step_is_shown_and_fails(tmp_path, monkeypatch):
    right = bench.attention_step_and_memory

    def wrong(*args, **kwargs):
        out, memory = right(*args, **kwargs)
        return (out * 1.0001 if kwargs["step"] == "fused" else out), memory

    monkeypatch.setattr(bench, "attention_step_and_memory", wrong)
    done = run("--out", tmp_path / "steps.svg")
    assert done.exit_code == 1
    assert "over the error budget: fused" in done.output


def test_a_suffix_that_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot draw .*steps\.txt: its suffix must be one of .*\.svg"):
        run("--out", tmp_path / "steps.txt")
    assert not list(tmp_path.iterdir())


def test_flops_count_visible_pairs_only():
    assert bench.Problem(seqlen=4, head_dim=2, heads=3).flops == 4 * 3 * 16 * 2
    assert bench.Problem(seqlen=4, head_dim=2, heads=3, causal=True).flops == 4 * 3 * 10 * 2
