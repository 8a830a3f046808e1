"""scripts/install.sh on machines that lack something: it says which package brings it, before it changes anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("sh", "uname", "grep", "env", "cat", "touch")


@pytest.fixture
def machine(tmp_path):
    """A PATH with the shell's tools and a compiler, and nothing else; and an empty folder to work in."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in (*TOOLS, "g++"):
        found = shutil.which(name)
        assert found is not None, name
        (tools / name).symlink_to(found)
    return tools


def install(machine: Path, python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(machine), "PYTHON": python, "VENV": str(machine.parent / "venv")}
    environment.pop("CXX", None)
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "install.sh"), "cli"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=machine.parent,
        check=False,
    )
    assert done.returncode == 1
    assert not (machine.parent / "venv").exists()
    return done


def shim(machine: Path, name: str, script: str) -> str:
    path = machine / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return name


def test_without_a_compiler(machine):
    (machine / "g++").unlink()
    done = install(machine, sys.executable)
    assert "no C++ compiler" in done.stderr
    assert "sudo apt install g++" in done.stderr
    assert "sudo dnf install gcc-c++" in done.stderr


def test_without_python(machine):
    done = install(machine, "python3")
    assert "'python3' was not found" in done.stderr
    assert "sudo apt install python3 python3-venv" in done.stderr


def test_without_venv(machine):
    """Debian ships Python without ensurepip."""
    lacking = f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
    done = install(machine, shim(machine, "python3", lacking))
    assert "has no venv" in done.stderr
    assert "sudo apt install python3-venv" in done.stderr


def test_with_an_old_python(machine):
    old = 'case "$*" in *version_info*) exit 1;; *--version*) echo "Python 3.8.10";; esac'
    done = install(machine, shim(machine, "python3", old))
    assert "Python 3.8.10 is too old; Python 3.10 or newer is needed" in done.stderr


def test_on_another_system(machine):
    (machine / "uname").unlink()
    shim(machine, "uname", "echo Darwin")
    assert "this is Darwin; only Linux is supported" in install(machine, sys.executable).stderr


def test_make_names_its_commands():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True)
    for command in ("make demo", "make test", "make lint", "make bench", "make clean"):
        assert command in done.stdout
