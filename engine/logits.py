"""The teacher's answers to images as they are stored, asked for once and kept: safetensors files of logits.

A file holds the answers to one part of the images: those of a shard, beside it, or some thousands of a stranger's
folder, under the run's output. Its metadata say to which images and of which teacher. What is trained on is always
what a file holds, so that a student has the same bytes whether the answers were made a moment or a kill ago.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from diffdfkd.engine.checkpoint import state_digest
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import Images
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.progress import progress_bar
from diffdfkd.engine.shards import canonical_json, write_atomic
from diffdfkd.engine.weights import stable_safetensors

log = logging.getLogger(__name__)

TOGETHER = 256
"""Images that the teacher is asked about at once, counted from the part's first: a constant, since the split may show
in an answer's last bit."""
PART = 4096
"""Images of a part where there are no shards."""


@dataclass(frozen=True)
class Part:
    """A run of images whose answers lie in one file."""

    file: Path
    images: int
    source: str
    """Digest of the images: answers to others are stale."""


class Stale(Exception):
    """A file of answers that must be made; the message is the reason."""


class Logits:
    """Answers by index of the image; of the files only those pages are in memory that were asked for."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """Of the parts' answers [n,K] in order."""
        self._parts = list(parts)
        self._ends = torch.tensor(list(accumulate(len(part) for part in parts)))

    def read(self, indices: Tensor) -> Tensor:
        """Answers float32 [n,K] to the images at these indices [n]."""
        places = torch.bucketize(indices, self._ends, right=True)
        pairs = zip(places.tolist(), (indices - self._ends[places]).tolist(), strict=True)
        # Counted from the end of its part an index is negative, and as good.
        return torch.stack([self._parts[place][index] for place, index in pairs])


def folder_parts(folder: Path, images: int, source: str) -> list[Part]:
    """Parts under `folder` for images that are not in shards of ours."""
    firsts = range(0, images, PART)
    return [
        Part(folder / f"part-{number:05d}.safetensors", min(PART, images - first), f"{source} {first}")
        for number, first in enumerate(firsts)
    ]


def uses_cache(recipe: DistillationRecipe, images: int) -> tuple[bool, str]:
    """Whether answers are kept, and the reason in words."""
    changes = ", ".join(recipe.augmentation)
    if recipe.reads_maps:
        return False, "the class-activation losses read the teacher's feature maps at each step"
    if recipe.teacher_logits == "cached" and changes:
        return True, f"as asked: the teacher's answers are those to the images before {changes}"
    if recipe.teacher_logits != "auto":
        return recipe.teacher_logits == "cached", "as asked"
    if changes:
        return False, f"with augmentation ({changes}) the teacher has to see what the student sees"
    if recipe.steps * recipe.batch_size < images:
        return False, "training looks at fewer images than there are"
    return True, "without augmentation an image has one answer"


def answers(teacher: Classifier, images: Tensor, dtype: str, *, graph: bool = False) -> Tensor:
    """The teacher's logits [n,K] for images in [0, 1], under autocast where `dtype` is bfloat16.

    With `graph` autograd records what needs a gradient; the logits are detached from it.
    """
    low = dtype == "bfloat16"
    with torch.set_grad_enabled(graph), torch.autocast(images.device.type, torch.bfloat16, enabled=low):
        return teacher(images).detach()


def to_float(pixels: Tensor, device: torch.device) -> Tensor:
    """Pixels uint8 as images in [0, 1] on the device."""
    return pixels.to(device, non_blocking=True).float() / 255


def keep_logits(
    teacher: Classifier,
    images: Images,
    parts: Sequence[Part],
    *,
    dtype: str,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    journal: Journal,
    progress: bool = True,
) -> Logits:
    """The teacher's answers to all images, from the parts' files as far as they are whole, the others made first.

    Processes share the making, and wait for each other. `teacher` is in eval mode on `device`. Raises UserError for
    a file that cannot be written.
    """
    if sum(part.images for part in parts) != len(images):
        raise ValueError(f"the parts are of {sum(part.images for part in parts)} images, there are {len(images)}")
    started = time.perf_counter()
    digest = teacher_digest(teacher, dtype)
    firsts = [0, *accumulate(part.images for part in parts)]
    made = 0
    shown = progress and rank == 0
    with progress_bar(len(range(rank, len(parts), processes)), "teacher's answers", unit="files", shown=shown) as bar:
        for part, first in list(zip(parts, firsts, strict=False))[rank::processes]:
            made += _make_if_stale(teacher, images, part, first, digest, dtype, device, journal)
            bar.update()
    if processes > 1:
        torch.distributed.barrier()
    if rank == 0:
        seconds = round(time.perf_counter() - started, 3)
        journal.log("teacher_logits", files=len(parts), made=made, processes=processes, seconds=seconds)
    kept = []
    for part, first in zip(parts, firsts, strict=False):
        if processes > 1:  # those of another process may lie on another machine's disk
            _make_if_stale(teacher, images, part, first, digest, dtype, device, journal)
        kept.append(read_part(part, digest, len(teacher.classes)))
    return Logits(kept)


def teacher_digest(teacher: Classifier, dtype: str) -> str:
    """SHA-256 of what answers depend on besides the images: weights, preprocessing, arithmetic."""
    content = [state_digest(teacher.state_dict()), repr(teacher.preprocessing), dtype]
    return hashlib.sha256(canonical_json(content)).hexdigest()


def read_part(part: Part, teacher: str, classes: int) -> Tensor:
    """Answers float32 [n,K] of a part's file; raises Stale unless they are whole, to its images, and the teacher's."""
    if not part.file.is_file():
        raise Stale("missing")
    try:
        with safetensors.safe_open(part.file, "pt") as file:
            metadata = file.metadata() or {}
            logits = file.get_tensor("logits")
    except (safetensors.SafetensorError, OSError) as error:
        raise Stale(f"unreadable ({' '.join(str(error).split())})") from None
    if metadata.get("images") != part.source:
        raise Stale("it belongs to other images")
    if metadata.get("teacher") != teacher:
        raise Stale("it belongs to another teacher, preprocessing or arithmetic")
    if logits.shape != (part.images, classes) or logits.dtype != torch.float32:
        raise Stale(f"it holds {list(logits.shape)} {logits.dtype}, not {[part.images, classes]}")
    if _sha256(logits) != metadata.get("sha256"):
        raise Stale("its content differs from its digest")
    return logits


def _make_if_stale(
    teacher: Classifier,
    images: Images,
    part: Part,
    first: int,
    digest: str,
    dtype: str,
    device: torch.device,
    journal: Journal,
) -> bool:
    """Write the part's file unless it is whole; whether it was written."""
    try:
        read_part(part, digest, len(teacher.classes))
        return False
    except Stale as reason:
        if part.file.exists():
            log.warning("%s is made again: %s", part.file, reason)
            journal.log("remake_logits", file=part.file.name, reason=str(reason))
    last = first + part.images
    made = []
    for start in range(first, last, TOGETHER):
        pixels, _ = images.read(range(start, min(start + TOGETHER, last)))
        batch = to_float(pixels, device).contiguous(memory_format=torch.channels_last)
        made.append(answers(teacher, batch, dtype).float().cpu())
    logits = torch.cat(made).contiguous()
    metadata = {"images": part.source, "teacher": digest, "sha256": _sha256(logits)}
    try:
        write_atomic(part.file, stable_safetensors({"logits": logits}, metadata))
    except OSError as error:
        raise UserError(
            f"distillation.teacher_logits: {part.file} cannot be written ({error.strerror}); make room, or set it to "
            "computed"
        ) from None
    return True


def _sha256(logits: Tensor) -> str:
    return hashlib.sha256(logits.numpy().data).hexdigest()
