"""Modules that are commands, as in ``python -m diffdfkd.recipes.render_icons``: a mistake is one line, exit code 2."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from diffdfkd.engine.errors import UserError


def run_command(command: typer.Typer | Callable[..., None]) -> None:
    """Run an application, or a function as the only command of one, and leave the process with its exit code."""
    if not isinstance(command, typer.Typer):
        # Without markup: help may hold brackets, such as those around a default path.
        application = typer.Typer(rich_markup_mode=None, add_completion=False)
        application.command()(command)
        command = application
    try:
        command()
    except UserError as error:
        sys.exit(complain(str(error)))


def refuse_json(file: Path | None) -> None:
    """UserError where ``--json`` names a file that cannot be written; asked before the work that it is to hold.

    Makes the folder of the file.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json: {file} cannot be written ({error.strerror}); choose another file") from None
    # It is written beside itself and renamed.
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--json: {file} cannot be written; choose another file")


def complain(message: str) -> int:
    """Print the message in one line to standard error; returns the exit code for bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
