"""The preview of a run for its report: a few samples with and without guidance, and what CutMix did to some."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine import shards
from diffdfkd.engine.alarms import Signs, Watch
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.painter import Models, Painter, Painting, encode, round_, saved_size, soft_label
from diffdfkd.engine.plan import choices_digest, trajectories
from diffdfkd.engine.preview_file import PREVIEW
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.signs import Look, Observation
from diffdfkd.engine.synthesis import preview_of, preview_signs, round_choices

PREVIEW_CLASSES, PREVIEW_PER_CLASS, PREVIEW_MIXES = 20, 2, 3


def preview_pairs(recipe: Recipe, models: Models, output: Path, journal: Journal) -> Path:
    """A few samples for the report, as image files and ``preview.json`` under ``output/preview``; returns the latter.

    Two samples of each of at most 20 classes, from the noise of the run's first samples but in a batch of their own and
    without CutMix: ``pairs`` has their class, class_name, sample, unguided and guided file (None where not guided or
    not finite). With CutMix on, ``mixes`` has owner, partner and child file, box (top, left, bottom, right in pixels,
    half open), area, names and soft_label of at most three. ``size`` is the images' edge in pixels. The figures are
    those of `preview_figures`. Nothing is made when the preview of the same choices is there and whole. Alarms are
    raised.
    """
    folder, file = output / PREVIEW.parent, output / PREVIEW
    digest = choices_digest(round_choices(recipe, models, 0))
    if (content := preview_of(output, digest)) is None:
        content = _make(recipe, models, folder, file, journal, digest)
    reference, guided = preview_signs(content)
    watch = Watch(recipe.guidance, journal, digest, reference)
    if guided is not None:
        watch.look(guided)
    return file


def _make(recipe: Recipe, models: Models, folder: Path, file: Path, journal: Journal, digest: str) -> dict[str, Any]:
    started = time.perf_counter()
    ids, classes = preview_samples(recipe)
    guided_run = recipe.guidance.mode != "none"
    batches = list(zip(ids.split(recipe.synthesis.batch_size), classes.split(recipe.synthesis.batch_size), strict=True))
    shards.remove_temporary(folder)
    pairs: list[dict[str, Any]] = []
    mixes: list[dict[str, Any]] = []
    with Painter(recipe, models, 0) as painter:
        paintings: dict[str, list[Painting]] = {"unguided": [], "guided": []}
        for batch_ids, batch_classes in batches:
            unguided = painter.paint(batch_ids, batch_classes, guided=False, mixed=False)
            guided = painter.paint(batch_ids, batch_classes, mixed=False) if guided_run else None
            paintings["unguided"].append(unguided)
            paintings["guided"] += [guided] if guided is not None else []
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
            if (recipe.cutmix.every or recipe.synthesis.fan_out > 1) and len(mixes) < PREVIEW_MIXES:
                cut = painter.paint(*_children(recipe, batch_ids, batch_classes))
                for i in _telling_mixes(cut)[: PREVIEW_MIXES - len(mixes)]:
                    mixes.append(_mix(recipe, models, folder, batch_ids, batch_classes, guided or unguided, cut, i))
    pairs.sort(key=lambda pair: (pair["class"], pair["sample"]))
    content = {
        "digest": digest,
        "size": saved_size(recipe),
        "pairs": pairs,
        "mixes": mixes,
        **preview_figures(recipe, models, paintings["unguided"], paintings["guided"]),
    }
    shards.write_atomic(file, shards.canonical_json(content) + b"\n")
    journal.log("preview", samples=len(ids), seconds=round_(time.perf_counter() - started), digest=digest)
    return content


def preview_samples(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Ids and classes [n] of the first samples of the run that a preview shows, classes mixed."""
    n_classes = len(recipe.teacher.classes)
    ids, classes = trajectories(recipe, 0, 0, PREVIEW_PER_CLASS * n_classes)
    shown = classes < PREVIEW_CLASSES
    return ids[shown], classes[shown]


def _children(recipe: Recipe, ids: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and classes [m n] of the children of trajectories [n]."""
    synthesis = recipe.synthesis
    steps = torch.arange(synthesis.fan_out)[:, None] * synthesis.batch_size
    return (ids + steps).flatten(), classes.repeat(synthesis.fan_out)


def preview_figures(
    recipe: Recipe, models: Models, unguided: Sequence[Painting], guided: Sequence[Painting] = ()
) -> dict[str, Any]:
    """What the teacher makes of the preview's samples, JSON-ready; "guided" is None in an unguided recipe.

    ``batchnorm``: L_bn of all samples as one batch. ``layers``: name, channels and the two L2 distances of each
    BatchNorm layer, in the order of the teacher's modules. ``by_class``: mean probability of the intended class, and
    share of the samples whose likeliest it is. ``signs``: what alarms are raised from.
    """
    looks: dict[str, Look | None] = {"unguided": None, "guided": None}
    signs: dict[str, Signs | None] = {"unguided": None, "guided": None}
    labels: dict[str, Tensor] = {}
    for which, paintings in (("unguided", unguided), ("guided", guided)):
        observation = Observation(models.teacher)
        for painting in paintings:
            observation.add(painting)
        if any(painting.alive.any() for painting in paintings):
            looks[which], labels[which] = (found := observation.look()), observation.labels
            signs[which] = observation.signs(found)
    layers = [
        {
            "name": layer.name,
            "channels": len(layer.mean),
            **{which: _distances(found, index) for which, found in looks.items()},
        }
        for index, layer in enumerate(next((found.layers for found in looks.values() if found), []))
    ]
    shown = sorted({label for own in labels.values() for label in own.tolist()})
    return {
        "batchnorm": {which: found and _rounded(found.batchnorm) for which, found in looks.items()},
        "layers": layers,
        "by_class": [
            {
                "class": label,
                "class_name": recipe.teacher.classes[label],
                **{which: found and _answers(found, labels[which], label) for which, found in looks.items()},
            }
            for label in shown
        ],
        "signs": {which: found and asdict(found) for which, found in signs.items()},
    }


def _distances(look: Look | None, index: int) -> dict[str, float] | None:
    if look is None:
        return None
    mean, variance = look.layers[index].distances
    return {"mean": round_(mean), "variance": round_(variance)}


def _answers(look: Look, labels: Tensor, label: int) -> dict[str, float] | None:
    """Of the samples of a class; None where none was finished."""
    own = look.probabilities[labels == label]
    if not len(own):
        return None
    agreement = (own.argmax(1) == label).float().mean().item()
    return {"confidence": round_(own[:, label].mean().item()), "agreement": round_(agreement)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round_(value)


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
    """Entry of ``preview.json`` on sample ``i`` of the mixed ones and its last patch, with its images written.

    The patch of a child may come from a child of another trajectory.
    """
    parent = cut.plan.lineage[i][-1]
    owner, known = i % len(ids), _children(recipe, ids, classes)[0].tolist()
    partner, child = known.index(parent.partner) % len(ids), known[i]
    scale = [saved_size(recipe) / n for n in models.prior.latent_shape[1:] * 2]
    return {
        "owner": _save(folder, f"uncut-{int(ids[owner]):05d}.png", uncut, owner),
        "partner": _save(folder, f"uncut-{int(ids[partner]):05d}.png", uncut, partner),
        "child": _save(folder, f"child-{child:05d}.png", cut, i),
        "box": [round(x * by) for x, by in zip(parent.box, scale, strict=True)],
        "area": round_(parent.area),
        "owner_class": recipe.teacher.classes[int(classes[owner])],
        "partner_class": recipe.teacher.classes[int(classes[partner])],
        "soft_label": soft_label(cut.targets[i]),
    }


def _telling_mixes(painting: Painting) -> list[int]:
    """Samples whose last patch shows best: few patches, and about half of the image."""
    parents = painting.plan.lineage
    mixed = [i for i in range(len(parents)) if parents[i] and painting.alive[i]]
    return sorted(mixed, key=lambda i: (len(parents[i]), abs(parents[i][-1].area - 0.5)))
