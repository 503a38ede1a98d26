"""Checkpoints of a distillation: which one may be continued, and how one is published so that a kill never hurts.

DeepSpeed writes the files of ``checkpoints/<tag>/``; ``state.json`` beside them says what they are, and the file
``checkpoints/latest`` names the folder only once all of it is on the disk.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.shards import canonical_json, write_atomic

TAG = re.compile(r"step-\d{8}-[0-9a-f]{12}")


class Segment(BaseModel):
    """Steps on one data set: a round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_step: int
    data: str
    """Digest of the images."""
    student: str
    """Digest of the student's weights before the first step."""


class State(BaseModel):
    """What ``state.json`` says of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Steps done, over all rounds."""
    recipe: str
    """Digest of everything else that the student depends on: see `recipe_digest` in distillation."""
    processes: int
    history: list[Segment]
    loss: float
    """Mean training loss over the steps that were last reported."""
    weights: str | None = None
    """Digest of the student's weights, where a round ends here."""

    def tag(self) -> str:
        """Name of the folder: of another history, another name, so that nothing is ever overwritten in place."""
        kin = hashlib.sha256(canonical_json(self.model_dump(include={"recipe", "processes", "history"})))
        return f"step-{self.step:08d}-{kin.hexdigest()[:12]}"


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, wherever it lies."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def published(folder: Path) -> State | None:
    """The state that ``latest`` names, or None if nothing was published; raises UserError for a broken one."""
    latest = folder / "latest"
    if not latest.exists():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not TAG.fullmatch(tag):
        raise UserError(f"{latest}: does not name a checkpoint; delete {folder} to start afresh")
    file = folder / tag / "state.json"
    try:
        state = State.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{file}: missing or damaged; delete {folder} to start afresh") from None
    if state.tag() != tag:
        raise UserError(f"{file}: describes {state.tag()}; delete {folder} to start afresh")
    return state


def continuation(
    state: State | None, *, recipe: str, data: str, student: str, until_step: int, processes: int, folder: Path
) -> tuple[list[Segment], bool, str]:
    """History to train under, whether the checkpoint is continued, and the reason in words.

    A checkpoint is continued if it was made by the same recipe and either stands in the same round (same images,
    same student at its beginning) or stands where the student given now stands: at the end of the round before.
    Raises UserError if it fits but was made by another number of processes, whose share of the optimizer it is.
    """
    afresh = [Segment(first_step=0, data=data, student=student)]
    if state is None:
        return afresh, False, "no checkpoint"
    if state.recipe != recipe:
        return afresh, False, f"the checkpoint at step {state.step} belongs to another recipe, seed, teacher or student"
    current = state.history[-1]
    if current.data == data and current.student == student and state.step <= until_step:
        history, reason = state.history, f"continued at step {state.step}"
    elif state.weights == student and current.data != data and state.step < until_step:
        history = [*state.history, Segment(first_step=state.step, data=data, student=student)]
        reason = f"new images from step {state.step} on"
    elif current.data != data:
        return afresh, False, f"the checkpoint at step {state.step} was trained on other images"
    else:
        return afresh, False, f"the checkpoint at step {state.step} began from another student, or lies further on"
    if state.processes != processes:
        raise UserError(
            f"{folder}: the checkpoint at step {state.step} was made by {state.processes} process(es), now there are "
            f"{processes}; start as many again, or delete the folder to begin afresh"
        )
    return history, True, reason


def publish(folder: Path, state: State) -> None:
    """Name the finished checkpoint as the latest, then delete all but this and the one before. For rank 0."""
    tag = state.tag()
    latest = folder / "latest"
    before = latest.read_text(encoding="utf-8").strip() if latest.exists() else None
    write_atomic(folder / tag / "state.json", canonical_json(state.model_dump()))
    for path in (folder / tag).iterdir():
        _flush(path)
    _flush(folder / tag)
    write_atomic(latest, tag.encode())
    for path in folder.iterdir():
        if TAG.fullmatch(path.name) and path.name not in (tag, before):
            shutil.rmtree(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_trusting_nothing(path: str | Path, types: list[Any], map_location: Any = None) -> Any:
    """A saved file with ``weights_only=True`` and the named types besides: no code in it can run.

    Raises UserError if the file is damaged or holds any other type.
    """
    try:
        with torch.serialization.safe_globals(types):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # bytes that are no pickle make the reader fail in any way
        problem = " ".join(str(error).split())[:200]
        folder = Path(path).parent.parent
        raise UserError(
            f"{path}: damaged, or not a checkpoint of this program; delete {folder} to start afresh ({problem})"
        ) from None
