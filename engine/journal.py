"""What happened in a run: one JSON object a line in ``metrics.jsonl``, and the curves for TensorBoard if wanted."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from diffdfkd.engine.errors import UserError


class Journal:
    """Appends events to a JSON-lines file, which a run that continues goes on with.

    Every line is handed to the operating system at once, so a killed process loses at most the line it was writing;
    that torn line is cut off when the file is next opened.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _cut_torn_line(path)
        self._stream = path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard))

    def log(self, event: str, **fields: Any) -> None:
        """One line with the event's name, the time in seconds since 1970 and the JSON-ready fields."""
        line = {"event": event, "time": round(time.time(), 3), **_plain(fields)}
        self._stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve, in the file (event ``scalar``) and in TensorBoard."""
        self.log("scalar", name=name, value=float(value), step=step)
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._stream.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Events in the order written; a last line torn by a kill is left out. Raises UserError for any other bad line."""
    lines = path.read_bytes().split(b"\n")
    return [_event(line, path, number) for number, line in enumerate(lines[:-1], 1)]


def _event(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        raise UserError(f"{path}: line {number} is damaged; take the line out, and give the command again")
    return event


def _cut_torn_line(path: Path) -> None:
    """Drop what follows the file's last line feed; reads backwards, since journals of long runs are large."""
    if not path.exists():
        return
    with open(path, "r+b") as stream:
        end = stream.seek(0, 2)
        while end > 0:
            start = max(0, end - 4096)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                stream.truncate(start + newline + 1)
                return
            end = start
        stream.truncate(0)


def _plain(value: Any) -> Any:
    """NaN and infinities as None, which JSON can say; containers likewise."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
