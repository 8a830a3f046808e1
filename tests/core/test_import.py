"""`import onepass` needs torch alone, reads no files of its own, and takes under 0.1 s beyond torch's own import."""

import subprocess
import sys

_EXTRAS = ("click", "rich", "matplotlib", "numpy", "safetensors", "triton")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_needs_torch_alone() -> None:
    """In a fresh interpreter in which every extra is missing for onepass."""
    run(
        "import sys, torch\n"
        f"for name in {_EXTRAS}: sys.modules.setdefault(name, None) if name not in sys.modules else None\n"
        "before = set(sys.modules)\n"
        "import onepass\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "onepass.attention(q, q, q)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"assert not new & {set(_EXTRAS)}, new\n"
    )


def test_is_quick() -> None:
    code = "import time, torch; start = time.process_time(); import onepass; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_loads_no_library_before_it_is_needed() -> None:
    """An installation without its C++ library still imports, explains, and runs the reference."""
    out = run(
        "import os; os.environ['ONEPASS_CPU_LIBRARY'] = '/nowhere/lib.so'\n"
        "import torch, onepass\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "onepass.attention(q, q, q, backend='reference')\n"
        "try:\n    onepass.attention(q, q, q)\n"
        "except onepass.UnsupportedError as error:\n    print(error)\n"
    )
    assert "cpu: ONEPASS_CPU_LIBRARY='/nowhere/lib.so' is not a file" in out


def test_subpackages_are_imported_when_first_used() -> None:
    run(
        "import sys, onepass\n"
        "assert {'nn', 'lab'} <= set(dir(onepass))\n"
        "assert not {'onepass.nn', 'onepass.lab'} & set(sys.modules)\n"
        "onepass.nn.Attention, onepass.lab.STEPS\n"
        "try:\n    onepass.nothing\n"
        "except AttributeError as error:\n    assert str(error) == \"module 'onepass' has no attribute 'nothing'\"\n"
        "else:\n    raise AssertionError\n"
    )
