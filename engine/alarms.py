"""Alarms: plain rules on a few figures of each shard and of the preview, which say that guidance goes wrong.

What a rule compares with are the same figures of unguided images from the same noise, taken once, from the preview.
All of it is in the journal, so that a run that continues raises what a kill kept from being raised, and nothing twice.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.recipe import GuidanceRecipe

log = logging.getLogger(__name__)

LARGE_LATENTS = 2.0
"""Times the size of unguided latents from which on a decoder is outside of what it was trained on."""
MORE_SATURATED = 0.3
"""Share of the pixel values by which more than in unguided images may be black or white."""
LEAST_DIVERSITY = 0.5
"""Least share of the unguided distance within a class."""
NEARLY_ALL = 0.9
"""Share of the images that the teacher takes for their class from which on its agreement is asked for proof."""
NO_BETTER = 0.9
"""Share of the unguided L_bn from which on L_bn has not improved."""

OTHER_NOISE = 2.0
"""Times by which a shard's L_bn must exceed these bounds: it is of other noise than the preview, and of few images."""


@dataclass(frozen=True)
class Signs:
    """Of finished images."""

    images: int
    """That the teacher looked at."""
    batchnorm: float | None
    """L_bn of these as one batch; None where the teacher's BatchNorm layers cannot be read."""
    agreement: float
    """Share of them that the teacher takes for their class."""
    saturated: float
    """Share of the pixel values that are 0 or 255."""
    latents: float
    """Root mean square of a finished latent's values, mean over the images."""
    distance: float | None
    """Within a class, as in ``diversity``; None where no class has two images."""


@dataclass(frozen=True)
class Alarm:
    kind: str
    """``batchnorm``, ``saturation``, ``diversity`` or ``agreement``."""
    message: str
    """What was found, and which knob to turn."""


Losses = Mapping[str, Mapping[str, float] | None]
"""Mean losses of the ``first`` and ``last`` guided step, by name."""


def find_alarms(
    guidance: GuidanceRecipe, signs: Signs, reference: Signs, losses: Losses | None = None, *, paired: bool = True
) -> list[Alarm]:
    """The alarms that guided images give beside unguided ones, ``reference``; none for an unguided recipe.

    ``paired`` says that both began with the same noise, so that L_bn may be compared without allowance.
    A rule whose figure is missing (a teacher without BatchNorm layers, a class weight alone) does not speak.
    """
    if guidance.mode == "none":
        return []
    rho = f"guidance.rho (now {guidance.rho:g})"
    alarms = []
    slack = 1.0 if paired else OTHER_NOISE
    first, last = ((losses or {}).get(which) or {} for which in ("first", "last"))
    if guidance.batchnorm_weight > 0:
        cure = f"lower {rho}, or raise guidance.batchnorm_weight against guidance.class_weight"
        # Equal where a trajectory has a single guided step.
        if last.get("batchnorm", 0) > first.get("batchnorm", 0):
            alarms.append(
                Alarm(
                    "batchnorm",
                    f"L_bn does not fall: {first['batchnorm']:.3g} in the first guided step, {last['batchnorm']:.3g} "
                    f"in the last; {cure}",
                )
            )
        elif signs.batchnorm is not None and reference.batchnorm is not None and share_of(signs, reference) >= slack:
            alarms.append(
                Alarm(
                    "batchnorm",
                    f"L_bn does not fall: {signs.batchnorm:.3g} with guidance, {reference.batchnorm:.3g} without; "
                    f"{cure}",
                )
            )
    cure = f"lower {rho}, or end guidance.window earlier"
    if signs.latents > LARGE_LATENTS * reference.latents:
        alarms.append(
            Alarm(
                "saturation",
                f"images are saturated: guided latents are {signs.latents / max(reference.latents, 1e-9):.2g} times as "
                f"large as unguided ones, outside of what the decoder knows; {cure}",
            )
        )
    elif signs.saturated > reference.saturated + MORE_SATURATED:
        alarms.append(
            Alarm(
                "saturation",
                f"images are saturated: {signs.saturated:.0%} of the pixels are black or white with guidance, "
                f"{reference.saturated:.0%} without; {cure}",
            )
        )
    if signs.distance is not None and reference.distance is not None:
        share = signs.distance / max(reference.distance, 1e-9)
        if share < LEAST_DIVERSITY:
            alarms.append(
                Alarm(
                    "diversity",
                    f"diversity collapses: images of a class are {share:.0%} as far apart as without guidance; lower "
                    f"{rho} or guidance.class_weight (now {guidance.class_weight:g})",
                )
            )
    if (
        signs.batchnorm is not None
        and reference.batchnorm is not None
        and signs.agreement >= NEARLY_ALL
        and share_of(signs, reference) >= NO_BETTER * slack
    ):
        alarms.append(
            Alarm(
                "agreement",
                f"the teacher agrees with {signs.agreement:.0%} of the labels, but L_bn is {signs.batchnorm:.3g} "
                f"with guidance and {reference.batchnorm:.3g} without, and agreement alone says nothing of an "
                f"image: raise guidance.batchnorm_weight (now {guidance.batchnorm_weight:g}), or lower "
                f"guidance.class_weight (now {guidance.class_weight:g})",
            )
        )
    return alarms


def share_of(signs: Signs, reference: Signs) -> float:
    """L_bn as a share of that of the reference, where both are known."""
    return (signs.batchnorm or 0.0) / max(reference.batchnorm or 0.0, 1e-9)


class Watch:
    """Raises a run's alarms, each kind once, to the terminal and to the journal (event ``alarm``).

    ``digest`` tells rows of other choices apart, which a folder's journal may hold from before it was begun anew. What
    a killed process noted of its shards, but could not raise any more, is raised at once. One thing is lost with a
    kill: the figures of a shard that was published, but not yet noted.
    """

    def __init__(self, guidance: GuidanceRecipe, journal: Journal, digest: str, reference: Signs | None) -> None:
        self._guidance, self._journal, self._digest, self._reference = guidance, journal, digest, reference
        rows = [row for row in read_journal(journal.path) if row.get("digest") == digest]
        self._raised = {row["kind"] for row in rows if row["event"] == "alarm"}
        for row in rows:
            if row["event"] == "shard" and row.get("signs") is not None:
                self.look(Signs(**row["signs"]), row.get("losses"), round=row["round"], shard=row["shard"])

    def look(
        self, signs: Signs, losses: Losses | None = None, *, round: int | None = None, shard: int | None = None
    ) -> list[Alarm]:
        """The alarms of a shard, or of the preview without ``shard``; new kinds are raised."""
        if self._reference is None:
            return []
        alarms = find_alarms(self._guidance, signs, self._reference, losses, paired=shard is None)
        for alarm in alarms:
            if alarm.kind in self._raised:
                continue
            self._raised.add(alarm.kind)
            where = "the preview" if shard is None else f"shard {shard} of round {round}"
            log.warning("alarm in %s: %s", where, alarm.message)
            self._journal.log("alarm", **asdict(alarm), round=round, shard=shard, digest=self._digest)
        return alarms


def alarms_in(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ``alarm`` events of a journal in the order raised, one of each kind; those of superseded choices left out."""
    rows = list(rows)
    digests = [row["digest"] for row in rows if row["event"] in ("preview", "shard", "alarm") and "digest" in row]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["event"] == "alarm" and row.get("digest") in (None, *digests[-1:]):
            found.setdefault(row["kind"], dict(row))
    return list(found.values())
