"""Progress of what takes longer than a few seconds: a bar on a terminal, whole lines in a file or pipe."""

import sys
from typing import TextIO

from tqdm import tqdm

EVERY = 30.0
"""Seconds from line to line where standard error is no terminal."""
LINE = "{desc}: {n_fmt} of {total_fmt}{unit} after {elapsed}, {remaining} to go{postfix}"


class Lines:
    """A stream that takes what is drawn over one line of a terminal, and writes each state of it as a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        if (state := text.strip()) and state != self._last:
            self._stream.write(state + "\n")
            self._last = state

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, description: str, *, unit: str, shown: bool, done: int = 0) -> tqdm:
    """A context manager, on standard error; ``done`` of ``total`` are there already, ``unit`` is their plural.

    Where it is not ``shown``, nothing is written.
    """
    shown = shown and sys.stderr is not None  # as where a service closes it
    terminal = shown and sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=f" {unit}",
        disable=not shown,
        file=sys.stderr if terminal else Lines(sys.stderr),
        bar_format=None if terminal else LINE,
        mininterval=0.1 if terminal else EVERY,
        maxinterval=10.0 if terminal else EVERY,
    )
