"""The preview of a run for its report: a few samples with and without guidance, and what CutMix did to some."""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdfkd.engine import shards
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.painter import Models, Painter, Painting, encode, round_, saved_size, soft_label
from diffdfkd.engine.plan import choices_digest, class_labels, sample_ids
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.synthesis import round_choices

PREVIEW_CLASSES, PREVIEW_PER_CLASS, PREVIEW_MIXES = 20, 2, 3


def preview_pairs(recipe: Recipe, models: Models, output: Path, journal: Journal) -> Path:
    """A few samples for the report, as image files and ``preview.json`` under ``output/preview``; returns the latter.

    Two samples of each of at most 20 classes, from the noise of the run's first samples but in a batch of their own and
    without CutMix: ``pairs`` has their class, class_name, sample, unguided and guided file (None where not guided or
    not finite). With CutMix on, ``mixes`` has owner, partner and child file, box (top, left, bottom, right in pixels,
    half open), area, names and soft_label of at most three. ``size`` is the images' edge in pixels. Nothing is done
    when the preview of the same choices exists.
    """
    folder, file = output / "preview", output / "preview" / "preview.json"
    digest = choices_digest(round_choices(recipe, models, 0))
    if _made_of(file) == digest:
        return file
    started = time.perf_counter()
    n_classes = len(recipe.teacher.classes)
    ids = sample_ids(0, 0, PREVIEW_PER_CLASS * n_classes)
    classes = class_labels(recipe.seed, 0, 0, len(ids), n_classes)
    shown = classes < PREVIEW_CLASSES
    ids, classes = ids[shown], classes[shown]
    guided_run = recipe.guidance.mode != "none"
    batches = list(zip(ids.split(recipe.synthesis.batch_size), classes.split(recipe.synthesis.batch_size), strict=True))
    shards.remove_temporary(folder)
    pairs: list[dict[str, Any]] = []
    mixes: list[dict[str, Any]] = []
    with Painter(recipe, models, 0) as painter:
        for batch_ids, batch_classes in batches:
            unguided = painter.paint(batch_ids, batch_classes, guided=False, mixed=False)
            guided = painter.paint(batch_ids, batch_classes, mixed=False) if guided_run else None
            for i, (id, label) in enumerate(zip(batch_ids.tolist(), batch_classes.tolist(), strict=True)):
                pairs.append(
                    {
                        "class": label,
                        "class_name": recipe.teacher.classes[label],
                        "sample": id,
                        "unguided": _save(folder, f"unguided-{id:05d}.png", unguided, i),
                        "guided": _save(folder, f"guided-{id:05d}.png", guided, i),
                    }
                )
            if recipe.cutmix.every and len(mixes) < PREVIEW_MIXES:
                cut = painter.paint(batch_ids, batch_classes)
                for i in _telling_mixes(cut)[: PREVIEW_MIXES - len(mixes)]:
                    mixes.append(_mix(recipe, models, folder, batch_ids, batch_classes, guided or unguided, cut, i))
    pairs.sort(key=lambda pair: (pair["class"], pair["sample"]))
    content = {"digest": digest, "size": saved_size(recipe), "pairs": pairs, "mixes": mixes}
    shards.write_atomic(file, shards.canonical_json(content) + b"\n")
    journal.log("preview", samples=len(ids), seconds=round_(time.perf_counter() - started))
    return file


def _made_of(file: Path) -> str | None:
    """Digest of the choices in the preview's file; None where there is no such file, or a broken one."""
    try:
        return str(json.loads(file.read_bytes())["digest"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _save(folder: Path, name: str, painting: Painting | None, i: int) -> str | None:
    """File name of the written image; None for a sample that is not there."""
    if painting is None or not painting.alive[i]:
        return None
    shards.write_atomic(folder / name, encode(painting.images[i], "png"))
    return name


def _mix(
    recipe: Recipe,
    models: Models,
    folder: Path,
    ids: Tensor,
    classes: Tensor,
    uncut: Painting,
    cut: Painting,
    i: int,
) -> dict[str, Any]:
    """Entry of ``preview.json`` on sample ``i`` of the batch and its last patch, with its images written."""
    parent = cut.plan.parents[i][-1]
    partner = ids.tolist().index(parent.partner)
    scale = [saved_size(recipe) / n for n in models.prior.latent_shape[1:] * 2]
    return {
        "owner": _save(folder, f"uncut-{int(ids[i]):05d}.png", uncut, i),
        "partner": _save(folder, f"uncut-{parent.partner:05d}.png", uncut, partner),
        "child": _save(folder, f"child-{int(ids[i]):05d}.png", cut, i),
        "box": [round(x * by) for x, by in zip(parent.box, scale, strict=True)],
        "area": round_(parent.area),
        "owner_class": recipe.teacher.classes[int(classes[i])],
        "partner_class": recipe.teacher.classes[int(classes[partner])],
        "soft_label": soft_label(cut.targets[i]),
    }


def _telling_mixes(painting: Painting) -> list[int]:
    """Samples whose last patch shows best: few patches, and about half of the image."""
    parents = painting.plan.parents
    mixed = [i for i in range(len(parents)) if parents[i] and painting.alive[i]]
    return sorted(mixed, key=lambda i: (len(parents[i]), abs(parents[i][-1].area - 0.5)))
