"""The synthetic data set of a run: makes the shards that are missing.

A shard is a pure function of (recipe, round, shard index, student snapshot). So to continue a run is to verify the
shards that exist and make the others, and a kill costs the shard that was being made.
"""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffdfkd.engine import shards
from diffdfkd.engine.alarms import Signs, Watch
from diffdfkd.engine.cheap_steps import uses_light
from diffdfkd.engine.combinations import round_samples
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.painter import (
    Models,
    Painter,
    Painting,
    first_losses,
    last_losses,
    round_,
    uses_student,
)
from diffdfkd.engine.plan import (
    ShardPlan,
    choices_digest,
    differing_choices,
    shard_plan,
    synthesis_choices,
    weights_digest,
)
from diffdfkd.engine.preview_file import read_preview
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.progress import progress_bar
from diffdfkd.engine.prompts import class_prompts
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.shard_writer import ShardWriter, Written
from diffdfkd.engine.shards import DamagedShard
from diffdfkd.engine.signs import Observation

MOST_DROPPED = 0.01
"""Share of a run's samples that may be lost to non-finite numbers."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Count:
    """Samples of a shard."""

    images: int
    dropped: int


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

    Alarms are raised where the run's preview, which is made first, has the figures of unguided images to compare with.
    Raises UserError if the folder holds shards of other choices or more than the recipe asks for, and when more than
    one in a hundred of the run's samples were not finite.
    """
    root = output / "synthetic"
    folder = shards.round_folder(root, round)
    plans = shard_plan(recipe, round)
    choices = round_choices(recipe, models, round)
    shards.remove_temporary(folder)
    _refuse_foreign(root, folder, recipe, len(plans), choices)
    # Of the shards only their counts are kept: a sidecar repeats all choices, and there may be very many.
    existing = {plan.index: count for plan in plans if (count := _existing(folder, plan, journal)) is not None}
    lost = sum(sidecar.dropped for earlier in range(round) for sidecar in shards.list_shards(root, earlier))
    lost += sum(count.dropped for count in existing.values())
    _refuse_loss(recipe, lost)

    first_digest = choices_digest({field: value for field, value in choices.items() if field != "student"})
    reference, _ = preview_signs(preview_of(output, first_digest))
    watch = Watch(recipe.guidance, journal, first_digest, reference)
    missing = [plan for plan in plans if plan.index not in existing]
    made: list[Count] = []
    seconds = 0.0
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        bar = progress_bar(
            round_samples(recipe, round),
            f"synthesis, round {round + 1} of {recipe.rounds}",
            unit="images",
            shown=progress,
            done=sum(plan.samples for plan in plans if plan.index in existing),
        )
        started = last = time.perf_counter()

        def record(shard: "_Shard") -> None:
            """Wait until it is written, look at it and keep what is to be known of it."""
            nonlocal lost, seconds, last
            began = time.perf_counter()
            sidecar, writing, at = shard.written.result()
            waited = shard.waited + time.perf_counter() - began
            losses, observation = shard.losses(), shard.observation
            signs = observation.signs(observation.look()) if observation and sidecar.images else None
            made.append(Count(sidecar.images, sidecar.dropped))
            lost += sidecar.dropped
            journal.log(
                "shard",
                round=round,
                shard=sidecar.index,
                images=sidecar.images,
                dropped=sidecar.dropped,
                seconds=round_(at - last),  # since the one before was done; this is written one shard later
                writing_seconds=round_(writing + waited),
                losses=losses,
                signs=signs and asdict(signs),
                digest=first_digest,
            )
            if signs is not None:
                with tqdm.external_write_mode():
                    watch.look(signs, losses, round=round, shard=sidecar.index)
            last, seconds = at, time.perf_counter() - started
            _refuse_loss(recipe, lost)

        with bar, Painter(recipe, models, round) as painter, ShardWriter() as writer:
            before: _Shard | None = None
            for plan in missing:
                shard = _Shard(Observation(models.teacher, reference.images) if reference is not None else None)
                try:
                    shard.make(painter, writer, plan, folder, choices, bar)
                finally:
                    # While the thread writes this one, the one before is looked at.
                    if before is not None:
                        record(before)
                before = shard
            if before is not None:
                record(before)
    if fault := shards.damaged_line(root):
        log.warning("%s is written again: %s", root / shards.MANIFEST, fault)
    shards.write_manifest(root, rounds=round + 1)
    ours = [*existing.values(), *made]
    return SynthesisSummary(
        images=sum(count.images for count in ours),
        dropped=sum(count.dropped for count in ours),
        made=sum(count.images for count in made),
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
    return synthesis_choices(recipe, prior, teacher, snapshot, decoder_digest(recipe, models.prior))


def decoder_digest(recipe: Recipe, prior: Prior) -> str | None:
    """Of the light decoder that the recipe guides through; None without one."""
    if not uses_light(recipe.guidance):
        return None
    light = prior.guidance_decoder
    if light is None:
        raise ValueError(f"guidance.decoder={recipe.guidance.decoder} is not loaded with the prior")
    return weights_digest([light], light.settings())


def preview_of(output: Path, digest: str) -> dict[str, Any] | None:
    """Content of the run's preview; None unless there is one, whole and of the choices with this digest."""
    try:
        content = read_preview(output)
    except UserError as error:
        log.warning("%s", error)
        return None
    return content if content is not None and content["digest"] == digest and "signs" in content else None


def preview_signs(content: dict[str, Any] | None) -> tuple[Signs | None, Signs | None]:
    """Signs of a preview's unguided and guided images, as far as there are any."""
    given = (content or {}).get("signs", {})
    unguided, guided = (given.get(which) for which in ("unguided", "guided"))
    return (Signs(**unguided) if unguided else None), (Signs(**guided) if guided else None)


class _Shard:
    """A shard on its way to the disk, and what is noted of its batches."""

    def __init__(self, observation: Observation | None) -> None:
        self.observation = observation
        self.written: Future[Written] = Future()
        self.waited = 0.0
        """Seconds that denoising it waited for the writer's thread."""
        self._losses: list[Tensor] = []

    def make(
        self,
        painter: Painter,
        writer: ShardWriter,
        plan: ShardPlan,
        folder: Path,
        choices: dict[str, Any],
        bar: tqdm,
    ) -> None:
        """Denoise it; the writer's thread goes on writing."""

        def painted(painting: Painting) -> None:
            self._losses.append(painting.losses)
            if self.observation is not None:
                self.observation.add(painting)
            bar.update(len(painting.images))

        write = partial(
            shards.write_shard,
            folder,
            plan.index,
            round=plan.round,
            digest=choices_digest(choices),
            choices=choices,
            licence=painter.prior.licence,
        )
        before = writer.waited
        self.written = writer.begin(painter.batches(plan), lambda batch: painter.samples(batch, painted), write)
        self.waited = writer.waited - before

    def losses(self) -> dict[str, dict[str, float] | None]:
        """Means of the first and last guided step over the batches."""
        return {"first": _mean(map(first_losses, self._losses)), "last": _mean(map(last_losses, self._losses))}


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
    surplus = [path for path in folder.glob("shard-*.tar") if _beyond(path.stem, planned)]
    surplus += [path for path in root.glob("round-*") if _beyond(path.name, recipe.rounds)]
    if surplus:
        raise UserError(
            f"output: {min(surplus)} is more than synthesis.images_per_class={recipe.synthesis.images_per_class} and "
            f"rounds={recipe.rounds} ask for; take another output folder, or raise them"
        )


def _beyond(name: str, planned: int) -> bool:
    """Whether a shard or round is more than was planned; so is one of a name that we do not give."""
    number = shards.number_in(name)
    return number is None or number >= planned


def _existing(folder: Path, plan: ShardPlan, journal: Journal) -> Count | None:
    """What a shard holds that is whole and as long as planned; None, with a logged reason, if it is to be made."""
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
    return Count(sidecar.images, sidecar.dropped)


def _refuse_loss(recipe: Recipe, dropped: int) -> None:
    """UserError as soon as more is lost than the whole run may lose; a bad start alone is no reason."""
    samples = recipe.synthesis.images_per_class * len(recipe.teacher.classes)
    if dropped > MOST_DROPPED * samples:
        guided = recipe.guidance.mode != "none"
        possible = {"a smaller guidance.rho": guided, "prior.dtype=float32": recipe.prior.dtype != "float32"}
        cures = [cure for cure, helps in possible.items() if helps]
        raise UserError(
            f"{'guidance.rho' if guided else 'prior'}: {dropped} of {samples} samples were not finite and had to be "
            f"dropped, more than {MOST_DROPPED:.0%}; take {' or '.join(cures) or 'another prior'}, and another output "
            "folder"
        )


def _mean(losses: Iterable[dict[str, float] | None]) -> dict[str, float] | None:
    given = [entry for entry in losses if entry is not None]
    return {name: round_(sum(entry[name] for entry in given) / len(given)) for name in given[0]} if given else None
