"""The command line: `onepass COMMAND`. This file knows the commands' names; each lives in `onepass.commands` and is
imported when it is asked for.
"""

from __future__ import annotations

import importlib
import sys

try:
    import click
    import rich  # noqa: F401  (every command draws with it: better to say so here, once)
except ModuleNotFoundError as error:
    raise SystemExit(
        f"onepass: the command line needs {error.name}. Install it with: pip install 'onepass[cli]'"
    ) from None

import onepass
from onepass.core.cpu_library import CpuLibraryError

COMMANDS = {
    "info": "What this machine has, and which kernels it can run.",
    "check": "Compare every backend on this machine with fp64.",
    "demo": "Show everything in a few minutes and write a report.",
    "generate": "Write text with a model, as it streams.",
    "train": "Train a small model on any text.",
    "bench": "Measure an operation against PyTorch.",
    "steps": "Attention in four steps, from naive to flash.",
}

# What library code raises for a user to read: shown as one line, without a traceback.
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    MemoryError,
    onepass.UnsupportedError,
    CpuLibraryError,
)


class LazyCommands(click.Group):
    """A group that imports a command's module only when that command runs; `--help` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"onepass.commands.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error came from.")
@click.version_option(onepass.__version__, message="onepass %(version)s")
def cli() -> None:
    """onepass: fused transformer kernels that read memory once."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed or the user stopped it, 2 the request was wrong."""
    args = sys.argv[1:] if args is None else args
    try:
        cli.main(args, prog_name="onepass", standalone_mode=True)
    except USER_ERRORS as error:
        if "--traceback" in args:
            raise
        click.echo(f"onepass: {error}", err=True)
        sys.exit(2)
