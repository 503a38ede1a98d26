"""Unguided samples of the prior with noise of their own, kept as the teacher's features, beside which a run is judged.

Bounded in number and in their share of the run, so that the comparison costs little beside the images themselves.
"""

import logging
import time
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.diversity import READ_AT_ONCE
from diffdfkd.engine.features import FeatureTap
from diffdfkd.engine.images import Images
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.painter import Models, Painter, round_
from diffdfkd.engine.plan import choices_digest, class_labels, sample_ids
from diffdfkd.engine.recall import compare_sets
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.engine.synthesis import round_choices
from diffdfkd.engine.weights import stable_safetensors

REFERENCE = Path("preview") / "unguided.safetensors"
"""In a run's folder."""
MOST = 256
SHARE = 10
"""One unguided sample for so many images of the run, at most."""
LEAST = 16
"""Of two halves with fewer images than half of these, neighbours say little."""
ROUND = 2**20
"""Of the samples' ids: no run has so many rounds, so that their noise is that of no image."""

log = logging.getLogger(__name__)


def reference_count(recipe: Recipe) -> int:
    """Samples, an even number of each class where there is room for that; 0 where they would say nothing."""
    classes = len(recipe.teacher.classes)
    most = min(MOST, classes * recipe.synthesis.images_per_class // SHARE)
    count = most // (2 * classes) * (2 * classes) if most >= 2 * classes else most // 2 * 2
    return count if count >= LEAST and recipe.guidance.mode != "none" else 0


def keep_reference(recipe: Recipe, models: Models, output: Path, journal: Journal) -> None:
    """Write ``output/preview/unguided.safetensors``, unless that of the same choices is there, or none is wanted."""
    count, digest = reference_count(recipe), choices_digest(round_choices(recipe, models, 0))
    if not count or _read(output, digest) is not None:
        return
    started = time.perf_counter()
    ids = sample_ids(ROUND, 0, count)
    classes = class_labels(recipe.seed, ROUND, 0, count, len(recipe.teacher.classes))
    batch = recipe.synthesis.batch_size
    features, labels, kind = [], [], ""
    with Painter(recipe, models, 0) as painter, FeatureTap(models.teacher) as tap:
        for batch_ids, batch_classes in zip(ids.split(batch), classes.split(batch), strict=True):
            painting = painter.paint(batch_ids, batch_classes, guided=False, mixed=False)
            own, kind = tap.read(painting.images[painting.alive])
            features.append(own)
            labels.append(batch_classes[painting.alive])
    kept = {"features": torch.cat(features), "labels": torch.cat(labels)}
    write_atomic(output / REFERENCE, stable_safetensors(kept, {"digest": digest, "features": kind}))
    journal.log("reference", samples=len(kept["labels"]), seconds=round_(time.perf_counter() - started))


def beside_reference(output: Path, teacher: Classifier, images: Images) -> dict[str, Any] | None:
    """What `compare_sets` says of as many of the run's images, evenly spread, as there are unguided ones; or None."""
    found = _read(output)
    if found is None:
        return None
    unguided, labels, kind = found
    chosen = spread(len(images), len(unguided), len(teacher.classes))
    features, own_labels = [], []
    with FeatureTap(teacher) as tap:
        for first in range(0, len(chosen), READ_AT_ONCE):
            pixels, own = images.read(chosen[first : first + READ_AT_ONCE])
            features.append(tap.read(pixels)[0])
            own_labels.append(own)
    return compare_sets(torch.cat(features), torch.cat(own_labels), unguided, labels, len(teacher.classes), kind)


def spread(images: int, count: int, classes: int) -> list[int]:
    """Indices of at most `count` images, in runs of `classes` where two fit: such a run has every class once.

    The runs lie evenly spread, and take turns being in the first half of the result and in the second.
    """
    together = classes if count >= 2 * classes else 1
    runs = min(count, images) // together
    starts = [run * (images // together) // runs * together for run in range(runs)]
    return [start + place for start in starts[0::2] + starts[1::2] for place in range(together)]


def _read(output: Path, digest: str | None = None) -> tuple[Tensor, Tensor, str] | None:
    """Features [N, D], labels [N] and what the features are; None where no such file is there, whole."""
    file = output / REFERENCE
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            features, labels = content.get_tensor("features"), content.get_tensor("labels")
    except (safetensors.SafetensorError, OSError) as error:
        log.warning("%s: damaged, and left aside (%s)", file, " ".join(str(error).split()))
        return None
    if digest is not None and metadata.get("digest") != digest:
        return None
    return features, labels, metadata.get("features", "")
