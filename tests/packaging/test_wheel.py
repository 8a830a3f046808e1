"""The wheel: one for every Python, whole, needing torch alone; installed in a bare environment and called there."""

import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def newest_source() -> float:
    """When a file that goes into the wheel was last changed."""
    folders = (ROOT / "src", ROOT / "csrc")
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".cpp", ".h", ".def")]
    return max(file.stat().st_mtime for file in (*files, ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `make` has built if it is newer than the sources, else a new one from the same command."""
    built = list((ROOT / "dist").glob("onepass-*.whl"))
    if len(built) == 1 and built[0].stat().st_mtime > newest_source():
        return built[0]
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def bare_python(wheel, tmp_path_factory):
    """An interpreter whose environment holds the wheel, and torch by reference."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch_by_reference.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def run(python: Path, code: str) -> str:
    """stdout of `code` in an interpreter that sees neither this checkout nor PYTHONPATH."""
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_wheel_for_every_python(wheel):
    assert re.fullmatch(r"onepass-[0-9.]+-py3-none-(many)?linux_\w+\.whl", wheel.name)


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"onepass"}
    assert "onepass/_lib/libonepass_cpu.so" in names
    in_source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/onepass").rglob("*.py")}
    assert in_source <= set(names)
    weights = [info for info in zipfile.ZipFile(wheel).infolist() if info.filename.endswith(".safetensors")]
    assert sum(info.file_size for info in weights) <= 3_000_000


def test_library_needs_libc_alone(wheel, tmp_path):
    """No libstdc++, no second OpenMP runtime; no weak symbol that could replace another library's by code for a newer
    processor.
    """
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("readelf and nm (binutils) are not installed")
    library = zipfile.ZipFile(wheel).extract("onepass/_lib/libonepass_cpu.so", tmp_path)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert set(needed) <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[1] for line in symbols.splitlines()}
    assert kinds == {"T"}
    assert all(line.split()[2].startswith("onepass_") for line in symbols.splitlines())


def test_only_torch_is_required():
    unconditional = [requirement for requirement in requires("onepass") or [] if "extra ==" not in requirement]
    assert [re.split(r"[<>=!~ ]", requirement)[0] for requirement in unconditional] == ["torch"]


def test_runs_in_a_bare_environment(bare_python):
    found = run(
        bare_python,
        "import onepass, torch\n"
        "torch.manual_seed(0)\n"
        "q, k, v = (torch.randn(2, 37, 4, 40, requires_grad=True) for _ in range(3))\n"
        "out = onepass.attention(q, k, v, causal=True, backend='cpu')\n"
        "ref = onepass.attention(q, k, v, causal=True, backend='reference')\n"
        "do = torch.randn_like(out)\n"
        "pairs = zip(torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(ref, (q, k, v), do))\n"
        "print(onepass.__file__, float((out - ref).abs().max()), max(float((a - b).abs().max()) for a, b in pairs))\n",
    )
    file, forward, backward = found.split()
    assert Path(file).is_relative_to(bare_python.parents[1])
    assert float(forward) < 1e-5
    assert float(backward) < 1e-4


def test_import_pulls_torch_alone_and_is_quick(bare_python):
    code = (
        "import sys, time, json, torch\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import onepass\n"
        "seconds = time.perf_counter() - start\n"
        "top = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps([seconds, sorted(top - set(sys.stdlib_module_names))]))\n"
    )
    measured = [json.loads(run(bare_python, code)) for _ in range(3)]
    for _, modules in measured:
        assert set(modules) <= {"onepass", "torch"}
    assert min(seconds for seconds, _ in measured) < 0.1


def test_missing_extras_are_named(bare_python):
    """Without click the command line says what to install."""
    code = (
        "import sys\n"
        "sys.modules['click'] = None\n"
        "try:\n"
        "    import onepass.cli\n"
        "except SystemExit as stop:\n"
        "    print(stop)\n"
    )
    assert "pip install 'onepass[cli]'" in run(bare_python, code)
