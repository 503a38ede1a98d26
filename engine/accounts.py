"""Time and memory of a run over all its sessions, killed ones included, from the events in its journal."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accounts:
    """Seconds and MiB of the run so far."""

    images: int
    """Images of the shards whose time is known."""
    synthesis_seconds: float
    """Of the shards that lie on disk: a shard made twice counts once, with its last time."""
    distillation_seconds: float
    wall_seconds: float
    """Summed over sessions, from start to last sign of life; pauses between sessions do not count."""
    sessions: int
    peak_memory_mib: float | None
    """Highest of all sessions."""
    stages: dict[str, float]
    """Seconds by stage in the order of first use; a stage that was killed counts in ``wall_seconds`` alone."""

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.synthesis_seconds if self.synthesis_seconds > 0 else None


def accounts(rows: Iterable[Mapping[str, Any]]) -> Accounts:
    """Sum up a journal. A distillation that was killed counts from its start to the last step that it reported."""
    made: dict[tuple[int, int], Mapping[str, Any]] = {}
    stages: dict[str, float] = {}
    distillation = wall = 0.0
    began = last = peak = training = trained = None
    sessions = 0
    for row in rows:
        if row["event"] == "session":
            wall += 0.0 if began is None else last - began
            wall += row.get("seconds_before", 0.0)
            distillation += 0.0 if training is None else trained - training
            training = None
            began, sessions = row["time"], sessions + 1
        elif row["event"] == "shard":
            made[row["round"], row["shard"]] = row
        elif row["event"] == "stage":
            stages[row["stage"]] = stages.get(row["stage"], 0.0) + row["seconds"]
        elif row["event"] == "distillation":
            # A call that found all steps done spent its time on loading.
            distillation += row["seconds"] if row.get("start_step", 0) < row.get("steps", 1) else 0.0
            training = None
        elif row["event"] == "distill_start":
            training = trained = row["time"]
        elif row["event"] == "distill":
            trained = row["time"]
        if (memory := row.get("peak_memory_mib")) is not None:
            peak = memory if peak is None else max(peak, memory)
        last = row["time"]
    wall += 0.0 if began is None else last - began
    distillation += 0.0 if training is None else trained - training
    return Accounts(
        images=sum(row["images"] for row in made.values()),
        synthesis_seconds=sum(row["seconds"] for row in made.values()),
        distillation_seconds=distillation,
        wall_seconds=wall,
        sessions=sessions,
        peak_memory_mib=peak,
        stages=stages,
    )
