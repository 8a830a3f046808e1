"""check, bench and demo as a user runs them, on small settings; the errors they print."""

import base64
import json
import re

import pytest
import torch
from click.testing import CliRunner

from onepass import cli
from onepass.commands import check
from onepass.commands.html_report import Report
from onepass.ops.attention import kernels
from onepass.testing.faults import replaced


def invoke(*args, **options):
    return CliRunner().invoke(cli.cli, list(args), **options)


def test_check_passes_and_counts_cases():
    done = invoke("check", "--match", "plain")
    assert done.exit_code == 0, done.output
    for words in ("cpu", "reference", "float32", "bfloat16", "float16", "out", "dq"):
        assert words in done.output


def test_check_fails_when_a_kernel_is_wrong():
    """A planted fault: everything one percent too large."""
    with replaced(kernels.FORWARD, "cpu", lambda forward: lambda *args: tuple(x * 1.01 for x in forward(*args))):
        done = invoke("check", "--match", "plain")
    assert done.exit_code == 1
    assert re.search(r"attention on cpu, torch\.float32, case .*: out: \S+ budgets", done.output.replace("\n", " "))


def test_check_without_cases():
    done = invoke("check", "--match", "no such case")
    assert done.exit_code == 2
    assert "no case's name contains 'no such case'" in done.output


def test_check_is_the_same_for_the_same_seed():
    first, second = (check.measure(seed=3, match="plain") for _ in range(2))
    assert [row.worst for row in first] == [row.worst for row in second]


def test_bench_writes_draws_and_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "mine.json"
    quick = ("bench", "attention", "--quick", "--group", "call", "--repeats", "2", "--threads", "1")
    done = invoke(*quick, "--out", str(out), "--plot")
    assert done.exit_code == 0, done.output
    assert "one call" in done.output
    result = json.loads(out.read_text())
    assert list(result["groups"]) == ["call"]
    pictures = list((tmp_path / "onepass-bench" / "plots").glob("*/mine-call.svg"))
    assert len(pictures) == 1
    again = invoke("bench", "attention", "--no-run", "--out", str(out))
    assert again.exit_code == 0, again.output
    assert "one call" in again.output
    assert json.loads(out.read_text()) == result


def test_bench_lists_and_refuses():
    listed = invoke("bench", "--list")
    assert listed.exit_code == 0
    assert re.search(r"^attention \(cpu\): forward-fp32, ", listed.output, re.MULTILINE)
    missing = invoke("bench", "attention", "--no-run", "--out", "/nonexistent/result.json")
    assert isinstance(missing.exception, ValueError)
    assert "no result /nonexistent/result.json yet: run without --no-run" in str(missing.exception)


@pytest.mark.slow
def test_demo_writes_one_page_with_its_pictures(tmp_path):
    small = ("--tokens", "40", "--train-seconds", "1", "--group", "call", "--match", "plain")
    done = invoke("demo", "--out", str(tmp_path), *small)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    pictures = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', page)
    assert {kind for kind, _ in pictures} == {"png", "svg+xml"}
    for _, data in pictures:
        assert base64.b64decode(data)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "40 characters in" in page
    assert "best validation loss" in page
    assert torch.__version__ in page


def test_report_escapes(tmp_path):
    page = Report("<b>title</b>")
    page.section("<i>", "a & b")
    page.verbatim("<script>")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "<b>title" not in text
    assert "a &amp; b" in text
