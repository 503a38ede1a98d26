"""The synthetic data set of a run: makes the shards that are missing, and a preview for the report.

A shard is a pure function of (recipe, round, shard index, student snapshot). So to continue a run is to verify the
shards that exist and make the others, and a kill costs the shard that was being made.
"""

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffdfkd.engine import shards
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.painter import (
    Models,
    Painter,
    Painting,
    class_prompts,
    encode,
    first_losses,
    last_losses,
    round_,
    saved_size,
    soft_label,
    uses_student,
)
from diffdfkd.engine.plan import (
    ShardPlan,
    choices_digest,
    class_labels,
    differing_choices,
    round_samples,
    sample_ids,
    shard_plan,
    synthesis_choices,
    weights_digest,
)
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.shards import DamagedShard, Sidecar

MOST_DROPPED = 0.01
"""Share of a run's samples that may be lost to non-finite numbers."""
PREVIEW_CLASSES, PREVIEW_PER_CLASS, PREVIEW_MIXES = 20, 2, 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisSummary:
    """One round's images; rate = made / seconds."""

    images: int
    """On disk, of this round."""
    dropped: int
    """Non-finite and left out, of this round."""
    made: int
    """Images of the shards made now rather than found on disk."""
    seconds: float
    """Spent on those, first-batch warm-up, encoding and writing included."""
    shards: int
    digest: str
    """Of what the shards depend on: prior, teacher, student snapshot and the recipe's choices."""


def synthesize(
    recipe: Recipe, models: Models, round: int, output: Path, journal: Journal, progress: bool = True
) -> SynthesisSummary:
    """Make the round's missing or damaged shards under ``output/synthetic`` and bring the manifest up to date.

    Raises UserError if the folder holds shards of other choices or more than the recipe asks for, and when more than
    one in a hundred of the run's samples were not finite.
    """
    root = output / "synthetic"
    folder = shards.round_folder(root, round)
    plans = shard_plan(recipe, round)
    choices = round_choices(recipe, models, round)
    shards.remove_temporary(folder)
    _refuse_foreign(root, folder, recipe, len(plans), choices)
    existing = {plan.index: sidecar for plan in plans if (sidecar := _existing(folder, plan, journal)) is not None}
    before = [sidecar for earlier in range(round) for sidecar in shards.list_shards(root, earlier)]
    _refuse_loss(recipe, [*before, *existing.values()])

    missing = [plan for plan in plans if plan.index not in existing]
    made: list[Sidecar] = []
    seconds = 0.0
    if missing:
        bar = tqdm(
            total=round_samples(recipe, round),
            initial=sum(plan.samples for plan in plans if plan.index in existing),
            desc=f"synthesis, round {round + 1} of {recipe.rounds}",
            unit="img",
            disable=not progress,
        )
        started = time.perf_counter()
        with bar, Painter(recipe, models, round) as painter:
            for plan in missing:
                sidecar, losses = _make(painter, plan, folder, choices, bar)
                made.append(sidecar)
                now = time.perf_counter()
                journal.log(
                    "shard",
                    round=round,
                    shard=plan.index,
                    images=sidecar.images,
                    dropped=sidecar.dropped,
                    seconds=round_(now - started),
                    losses=losses,
                )
                seconds, started = seconds + now - started, now
                _refuse_loss(recipe, [*before, *existing.values(), *made])
    shards.write_manifest(root, rounds=round + 1)
    ours = [*existing.values(), *made]
    return SynthesisSummary(
        images=sum(sidecar.images for sidecar in ours),
        dropped=sum(sidecar.dropped for sidecar in ours),
        made=sum(sidecar.images for sidecar in made),
        seconds=seconds,
        shards=len(ours),
        digest=choices_digest(choices),
    )


def round_choices(recipe: Recipe, models: Models, round: int) -> dict[str, Any]:
    """What the round's shards depend on, with the digests of the loaded networks."""
    prior, teacher = models.digests([*class_prompts(recipe), ""])
    snapshot = None
    if uses_student(recipe, round):
        if models.student is None:
            raise ValueError(f"round {round} with guidance.adversarial_weight > 0 needs the student's snapshot")
        snapshot = weights_digest([models.student])
    return synthesis_choices(recipe, prior, teacher, snapshot)


def _make(
    painter: Painter, plan: ShardPlan, folder: Path, choices: dict[str, Any], bar: tqdm
) -> tuple[Sidecar, dict[str, dict[str, float] | None]]:
    """Write one shard; its sidecar and the mean losses of the first and last guided step over its batches."""
    losses: list[Tensor] = []

    def painted(painting: Painting) -> None:
        losses.append(painting.losses)
        bar.update(len(painting.images))

    sidecar = shards.write_shard(
        folder,
        plan.index,
        painter.shard(plan, painted),
        round=plan.round,
        digest=choices_digest(choices),
        choices=choices,
        licence=painter.prior.licence,
    )
    return sidecar, {"first": _mean(map(first_losses, losses)), "last": _mean(map(last_losses, losses))}


def _refuse_foreign(root: Path, folder: Path, recipe: Recipe, planned: int, choices: dict[str, Any]) -> None:
    """UserError for shards that this recipe would not make here: nothing of a user's is overwritten or mixed in."""
    for path in sorted(folder.glob("shard-*.json")):
        try:
            sidecar = shards.read_sidecar(path)
        except DamagedShard:
            continue  # made again below, with its reason
        if sidecar.choices != choices:
            differences = differing_choices(sidecar.choices, choices)
            raise UserError(
                f"output: {folder / sidecar.shard} was made by another recipe ({differences}); take another output "
                "folder, or go back to that recipe"
            )
    surplus = [path for path in folder.glob("shard-*.tar") if int(path.stem.rpartition("-")[2]) >= planned]
    surplus += [path for path in root.glob("round-*") if int(path.name.rpartition("-")[2]) >= recipe.rounds]
    if surplus:
        raise UserError(
            f"output: {min(surplus)} is more than synthesis.images_per_class={recipe.synthesis.images_per_class} and "
            f"rounds={recipe.rounds} ask for; take another output folder, or raise them"
        )


def _existing(folder: Path, plan: ShardPlan, journal: Journal) -> Sidecar | None:
    """The sidecar of a shard that is whole and as long as planned; None, with a logged reason, if it is to be made."""
    path = shards.shard_path(folder, plan.index)
    if not path.exists() and not path.with_suffix(".json").exists():
        return None
    try:
        sidecar = shards.verify_shard(path)
        if (samples := sidecar.images + sidecar.dropped) != plan.samples:
            raise DamagedShard(f"it has {samples} samples and is to have {plan.samples}")
    except DamagedShard as reason:
        log.warning("%s is made again: %s", path, reason)
        journal.log("remake", round=plan.round, shard=plan.index, reason=str(reason))
        return None
    return sidecar


def _refuse_loss(recipe: Recipe, sidecars: Sequence[Sidecar]) -> None:
    """UserError as soon as more is lost than the whole run may lose; a bad start alone is no reason."""
    dropped = sum(sidecar.dropped for sidecar in sidecars)
    samples = recipe.synthesis.images_per_class * len(recipe.teacher.classes)
    if dropped > MOST_DROPPED * samples:
        raise UserError(
            f"guidance.rho: {dropped} of {samples} samples were not finite and had to be dropped, more than "
            f"{MOST_DROPPED:.0%}; take a smaller guidance.rho or prior.dtype=float32, and another output folder"
        )


def _mean(losses: Iterable[dict[str, float] | None]) -> dict[str, float] | None:
    given = [entry for entry in losses if entry is not None]
    return {name: round_(sum(entry[name] for entry in given) / len(given)) for name in given[0]} if given else None


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
    if file.exists() and json.loads(file.read_bytes()).get("digest") == digest:
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
