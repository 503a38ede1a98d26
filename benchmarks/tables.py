"""Tables of results as CSV files."""

import csv
import io
from pathlib import Path
from typing import Any

from diffdfkd.engine.shards import write_atomic


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, whose columns are those of the first, whole or not at all; makes the folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())
