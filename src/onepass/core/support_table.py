"""The support table of the documentation, made from the kernels' own tables.

python -m onepass.core.support_table            writes docs/backends.md and the README's section
python -m onepass.core.support_table --check    exits with 1 when either is stale
"""

import argparse
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onepass.ops
from onepass.core.registry import Kernel, SupportTable

_BEGIN, _END = "<!-- support:begin -->", "<!-- support:end -->"
_MADE_BY = "Made by `python -m onepass.core.support_table` from the tables that choose the kernels."
_INTRODUCTION = """\
The kernel of the highest priority that has no reason against a call takes it. A backend named with `backend=` or
`use_backend` never falls back: what it cannot do raises `UnsupportedError` with these reasons. `reference` is the
definition in plain PyTorch and is used only by name. `onepass.explain` tells what one call would run."""
_YES, _NO = "yes", "-"


def support_tables() -> Iterator[SupportTable]:
    """Those of every operation that has a kernels.py."""
    for module in pkgutil.iter_modules(onepass.ops.__path__, "onepass.ops."):
        if module.ispkg and importlib.util.find_spec(f"{module.name}.kernels") is not None:
            yield from importlib.import_module(f"{module.name}.kernels").SUPPORT


def _reasons(kernel: Kernel, spec: Any) -> list[str]:
    return kernel.unsupported(spec._replace(arch=kernel.shown_on))


def readme_section() -> str:
    """One table: a row for each feature, a column for each direction, the backends that have it in the cells."""
    tables = list(support_tables())
    rows: dict[str, dict[str, str]] = {}
    for support in tables:
        chosen = [kernel for kernel in support.table.kernels if not kernel.by_name_only]
        for feature, spec in support.features().items():
            able = [kernel.backend for kernel in chosen if not _reasons(kernel, spec)]
            rows.setdefault(feature, {})[support.title] = ", ".join(able) or _NO
    titles = [support.title for support in tables]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells.get(title, '') for title in titles)} |" for name, cells in rows.items()]
    note = (
        "`reference`, plain PyTorch, does all of it when asked for by name; "
        "[docs/backends.md](docs/backends.md) has the reasons."
    )
    return "\n".join([*lines, "", note])


def backends_page() -> str:
    """docs/backends.md: every kernel against every feature, with the reasons of the refusals."""
    lines = ["# Backends", "", f"<!-- {_MADE_BY} -->", "", _INTRODUCTION]
    for support in support_tables():
        kernels = support.table.kernels
        lines += ["", f"## {support.title}", ""]
        lines += [f"| | {' | '.join(kernel.backend for kernel in kernels)} |", "|---" * (len(kernels) + 1) + "|"]
        for feature, spec in support.features().items():
            cells = ["; ".join(_reasons(kernel, spec)) or _YES for kernel in kernels]
            lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_section(readme: str) -> str:
    """The README's text with a fresh section between its markers. Raises ValueError when it has none."""
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the README has no section between {_BEGIN} and {_END}")
    return f"{before}{_BEGIN}\n{readme_section()}\n{_END}{after}"


def stale(root: Path) -> list[Path]:
    """The files under `root`, a source checkout, that differ from what this module would write."""
    return [path for path, text in _wanted(root).items() if not path.is_file() or path.read_text() != text]


def _wanted(root: Path) -> dict[Path, str]:
    readme = root / "README.md"
    return {readme: with_section(readme.read_text()), root / "docs" / "backends.md": backends_page()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m onepass.core.support_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is stale")
    parser.add_argument("--root", type=Path, default=Path(), help="the source checkout (default: here)")
    arguments = parser.parse_args()
    if arguments.check:
        found = stale(arguments.root)
        for path in found:
            print(f"{path} is stale: run python -m onepass.core.support_table")
        return 1 if found else 0
    for path, text in _wanted(arguments.root).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
