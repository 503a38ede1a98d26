"""Modules that are commands, as in ``python -m diffdfkd.recipes.render_icons``: a mistake is one line, exit code 2."""

import sys
from collections.abc import Callable

import typer

from diffdfkd.engine.errors import UserError


def run_command(command: typer.Typer | Callable[..., None]) -> None:
    """Run an application, or a function as the only command of one, and leave the process with its exit code."""
    try:
        command() if isinstance(command, typer.Typer) else typer.run(command)
    except UserError as error:
        sys.exit(complain(str(error)))


def complain(message: str) -> int:
    """Print the message in one line to standard error; returns the exit code for bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
