"""What happened in a run: one JSON object a line in ``metrics.jsonl``, and the curves for TensorBoard if wanted."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from diffdfkd.engine.errors import UserError

Losses = dict[str, dict[str, float | None] | None]


class _Event(BaseModel):
    """What is read of an event; what else stands in its line is not looked at."""

    model_config = ConfigDict(strict=True)

    event: str
    time: float
    digest: str | None = None
    peak_memory_mib: float | None = None


class _Session(_Event):
    seconds_before: float = 0


class _Signs(BaseModel):
    """As in `alarms.Signs`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    images: int
    batchnorm: float | None
    agreement: float
    saturated: float
    latents: float
    distance: float | None


class _Shard(_Event):
    round: int
    shard: int
    images: int
    seconds: float
    losses: Losses | None = None
    signs: _Signs | None = None


class _Stage(_Event):
    stage: str
    seconds: float


class _Distillation(_Event):
    seconds: float
    start_step: int = 0
    steps: int = 1
    images: int | None = None
    loss: float | None = None
    holdout_agreement: float | None = None


class _Scalar(_Event):
    name: str
    value: float | None
    step: int


class _Alarm(_Event):
    kind: str
    message: str
    round: int | None = None
    shard: int | None = None


EVENTS: dict[str, type[_Event]] = {
    "session": _Session,
    "shard": _Shard,
    "stage": _Stage,
    "distillation": _Distillation,
    "scalar": _Scalar,
    "alarm": _Alarm,
}
"""Events of which more than their time is read."""


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
        kind = event.get("event") if isinstance(event, dict) else None
        EVENTS.get(kind if isinstance(kind, str) else "", _Event).model_validate(event)
    except (ValueError, RecursionError) as error:
        place = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ()
        field = f" ({place[0]})" if place else ""
        raise UserError(
            f"{path}: line {number} is damaged{field}; take the line out, and give the command again"
        ) from None
    return dict(event)


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
