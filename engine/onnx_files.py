"""What every ONNX file that we write has in common: opset, a quiet exporter, no notes about this machine."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

OPSET = 21


def strip_notes(model: Any) -> None:
    """Take the exporter's notes, which name files of this machine, off a ModelProto."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.ClearField("doc_string")


def deepest_line(error: BaseException) -> str:
    """First line of the deepest cause, since the exporter wraps what went wrong into advice about bug reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def silent() -> Iterator[None]:
    """Without the exporter's warnings and dumps of graphs, which are for its own developers; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
