"""The command line. One file a command; a command imports torch only when it runs, so that `--help` answers at once.

To add a command: write `cli/<name>.py` with a function of that name, and list it in COMMANDS.
"""

from __future__ import annotations

import importlib
import io
import sys

import typer

from detr_fast.cli.terminal import lasting_output
from detr_fast.engine.signals import tidy_end

# In the order that `detr-fast --help` lists them.
COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "predict",
    "explain",
    "tune",
    "bench",
    "kernels",
    "convert-weights",
    "export",
    "doctor",
    "convert",
)

app = typer.Typer(
    name="detr-fast",
    help="Train and run DETR object detectors, fast. Start with [bold]detr-fast demo[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # user errors are one line (see main), all others deserve a plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from detr_fast import __version__

        print(f"detr-fast {__version__}")
        raise typer.Exit


for _name in COMMANDS:
    _function = _name.replace("-", "_")
    app.command(_name)(getattr(importlib.import_module(f"detr_fast.cli.{_function}"), _function))


def main(args: list[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit: 0, 2 for errors of the user's, 129, 130 or 143 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a "–" or "×" is no reason to lose the figures of a long evaluation
        sys.stdout.reconfigure(errors="replace")
    with lasting_output(), tidy_end():
        try:
            app(args, prog_name="detr-fast")
        except Exception as error:
            from detr_fast.cli.errors import explain_error

            explained = explain_error(error)
            if explained is None:
                raise
            message, status = explained
            print(message, file=sys.stderr)
            sys.exit(status)
