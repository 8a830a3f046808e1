"""The command line itself: names, help, messages, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from onepass import cli
from onepass.core import cpu_library


def onepass(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", "onepass", *args], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def test_help_names_every_command_and_imports_none():
    code = (
        "import sys\n"
        "from onepass.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, text in cli.COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout
    assert not [name for name in done.stderr.split() if name.startswith(("onepass.commands.", "matplotlib"))]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    done = CliRunner().invoke(cli.cli, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage:" in done.output


def test_unknown_command():
    done = CliRunner().invoke(cli.cli, ["informations"])
    assert done.exit_code == 2
    assert "No such command 'informations'" in done.output


def test_info_as_json():
    done = CliRunner().invoke(cli.cli, ["info", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["isa"] == cpu_library.isa()
    assert found["isas"] == cpu_library.isas()
    assert found["torch"] == torch.__version__


def test_info_names_processor_and_instruction_set():
    done = onepass("info")
    assert done.returncode == 0, done.stderr
    assert cpu_library.isa() in done.stdout
    assert torch.__version__ in done.stdout


def test_unknown_instruction_set_is_one_line_that_names_those_there(monkeypatch):
    monkeypatch.setenv("ONEPASS_CPU_ISA", "avx1024")
    done = onepass("bench", "attention", "--group", "call")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for name in ("avx1024", *cpu_library.isas()):
        assert name in done.stderr


def test_errors_of_the_library_are_one_line_with_the_trace_on_request():
    short, long = onepass("bench", "no-such-operation"), onepass("--traceback", "bench", "no-such-operation")
    assert short.returncode == 2
    assert short.stderr.startswith("onepass: there is no benchmark 'no-such-operation'; there are: attention")
    assert "Traceback" in long.stderr
