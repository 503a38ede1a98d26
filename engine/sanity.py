"""Whether a teacher's preprocessing is declared as it was trained: evidence from images that need not be its own.

The same images go through other preprocessings. Which of them fits is judged by the statistics that the teacher's
BatchNorm layers remember from training, and by how often the teacher names the class that was asked for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.signs import LOOKED_AT_ONCE, Layer, Look, look

CLEARLY = 1.4
"""Times nearer to the BatchNorm statistics that another preprocessing must be before the declared one looks wrong."""
NEAR = 0.35
"""Distance at which images fit a teacher's statistics so well that this alone bears out a preprocessing."""
SIGNIFICANT = 3.0
"""Standard errors."""
KEPT_CHANNELS = 0.9
"""Share of a layer's channels that count, the nearest: one that is all but dead would outweigh all others."""
SIZES = (28, 32, 64, 96, 128, 160, 224, 256)

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BYTES = (1 / 255,)
NORMALISATIONS: dict[int, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    1: {
        "0..1, not normalised": ((0.0,), (1.0,)),
        "-1..1": ((0.5,), (0.5,)),
        "0..255": ((0.0,), _BYTES),
        "MNIST's mean and std": ((0.1307,), (0.3081,)),
        "Fashion-MNIST's mean and std": ((0.286,), (0.353,)),
        "ImageNet's mean and std, of grey": ((0.449,), (0.226,)),
    },
    3: {
        "0..1, not normalised": ((0.0,), (1.0,)),
        "-1..1": ((0.5,), (0.5,)),
        "0..255": ((0.0,), _BYTES),
        "ImageNet's mean and std": _IMAGENET,
        "0..255 less ImageNet's mean": (_IMAGENET[0], _BYTES),
        "CIFAR-10's mean and std": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        "CIFAR-100's mean and std": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    },
}
"""By colour channels: name -> mean and std of images in [0, 1], in the order red, green, blue."""


@dataclass(frozen=True)
class Hypothesis:
    """How the teacher may have been trained to take images."""

    name: str
    preprocessing: Preprocessing
    changes: dict[str, Any] = field(default_factory=dict)
    """Recipe fields and the values that would declare it; empty for the declared one."""
    inverted: bool = False
    """Dark and light exchanged, which no field declares."""


@dataclass(frozen=True)
class Reading:
    """What N images look like to the teacher under a hypothesis."""

    hypothesis: Hypothesis
    look: Look
    hits: Tensor | None
    """[N] bool: the likeliest class is the one asked for; None where none was asked for."""

    @property
    def distance(self) -> float | None:
        """From the teacher's BatchNorm statistics; None where they cannot be read."""
        return statistics_distance(self.look.layers)

    @property
    def agreement(self) -> float | None:
        return None if self.hits is None else self.hits.float().mean().item()


def layer_distance(layer: Layer) -> float:
    """How far a layer's input is from its memory, in standard deviations.

    Of each channel the 2-Wasserstein distance of the two Gaussians, sqrt((m - M)^2 + (s - S)^2), over S; the mean over
    the nearest nine tenths of the channels.
    """
    stored = (layer.running_variance + 1e-5).sqrt()
    by_mean, by_spread = layer.mean - layer.running_mean, layer.variance.sqrt() - stored
    distances = (torch.hypot(by_mean, by_spread) / stored).sort().values
    return distances[: max(1, int(KEPT_CHANNELS * len(distances)))].mean().item()


def statistics_distance(layers: Sequence[Layer]) -> float | None:
    """Mean of the layers' distances with weights 1, 1/2, 1/3, ...: the first layers see preprocessing most directly."""
    if not layers:
        return None
    weights = [1 / (place + 1) for place in range(len(layers))]
    return sum(w * layer_distance(layer) for w, layer in zip(weights, layers, strict=True)) / sum(weights)


def hypotheses(declared: Preprocessing, native: int) -> Iterator[Hypothesis]:
    """The declared preprocessing, then others: normalisation and channel order in any pair, sizes, inverted grey.

    ``native`` is the edge of the prior's images in pixels; sizes far above it show nothing more, and cost time.
    """
    yield Hypothesis("as declared", declared)
    orders = ("rgb", "bgr") if declared.channels == 3 else ("rgb",)
    for order in sorted(orders, key=lambda order: order != declared.channel_order):
        turned = order != declared.channel_order
        change: dict[str, Any] = {"teacher.channel_order": order} if turned else {}
        if turned:
            own = replace(declared, mean=declared.mean[::-1], std=declared.std[::-1], channel_order=order)
            yield Hypothesis(f"channels {order}", own, change | _numbers(own, declared))
        for name, (mean, std) in NORMALISATIONS[declared.channels].items():
            step = -1 if order == "bgr" else 1
            other = replace(declared, mean=mean[::step], std=std[::step], channel_order=order)
            if not _same_numbers(other, declared):
                words = f"{name}, channels {order}" if turned else name
                yield Hypothesis(words, other, change | _numbers(other, declared))
    for size in SIZES:
        if size != declared.size and size <= 2 * native:
            yield Hypothesis(f"{size}x{size} pixels", replace(declared, size=size), {"teacher.size": size})
    if declared.channels == 1:
        yield Hypothesis("dark and light exchanged", declared, inverted=True)


def _numbers(other: Preprocessing, declared: Preprocessing) -> dict[str, Any]:
    """mean and std as recipe fields, where they differ."""
    fields = {"teacher.mean": (other.mean, declared.mean), "teacher.std": (other.std, declared.std)}
    return {name: [round(v, 6) for v in new] for name, (new, old) in fields.items() if new != old}


def _same_numbers(other: Preprocessing, declared: Preprocessing) -> bool:
    """Whether the two map black and white to about the same numbers, whatever the channel order."""

    def ends(preprocessing: Preprocessing) -> list[float]:
        means = (preprocessing.mean * 3)[:3] if len(preprocessing.mean) == 1 else preprocessing.mean
        stds = (preprocessing.std * 3)[:3] if len(preprocessing.std) == 1 else preprocessing.std
        if preprocessing.channel_order != declared.channel_order:
            means, stds = means[::-1], stds[::-1]
        return [(end - mean) / std for end in (0, 1) for mean, std in zip(means, stds, strict=True)]

    theirs, ours = ends(other), ends(declared)
    span = max(ours) - min(ours)
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 0.02 * span


def read(teacher: Classifier, hypothesis: Hypothesis, images: Tensor, asked: Tensor | None) -> Reading | None:
    """The teacher's view of images uint8 [N, C, H, W] of the classes asked for, [N]; None for a size it cannot take."""
    try:
        found = look(teacher.model, _inputs(teacher, hypothesis, images))
    except (RuntimeError, ValueError):
        if "teacher.size" in hypothesis.changes:  # most networks with a linear layer behind a grid of features
            return None
        raise
    hits = None if asked is None else found.probabilities.argmax(1) == asked
    return Reading(hypothesis, found, hits)


def _inputs(teacher: Classifier, hypothesis: Hypothesis, images: Tensor) -> Iterator[Tensor]:
    device = next(teacher.parameters()).device
    for part in images.split(LOOKED_AT_ONCE):
        values = part.to(device).float() / 255
        yield hypothesis.preprocessing(1 - values if hypothesis.inverted else values)


@dataclass(frozen=True)
class Judgement:
    """A preprocessing that explains the images clearly better than the declared one."""

    reading: Reading
    ratio: float | None
    """Times nearer to the BatchNorm statistics."""
    by_statistics: bool
    """Those decided, and not the agreement alone."""


def judge(readings: Sequence[Reading]) -> Judgement | None:
    """The best preprocessing, where it is clearly better than the first of the readings, the declared one.

    Either it is CLEARLY times nearer to the BatchNorm statistics, names the classes no worse, and is borne out: NEAR to
    them, or with an agreement above chance. Or the teacher names the classes better under it, by SIGNIFICANT standard
    errors over the images on which the two differ, and the statistics do not speak against it.
    """
    declared, *others = readings
    by_distance = declared.distance
    found: list[Judgement] = []
    for reading in others:
        ratio = None
        if by_distance is not None and (distance := reading.distance) is not None:
            ratio = by_distance / max(distance, 1e-9)
        better = preference(reading.hits, declared.hits)
        recognised = above_chance(reading)
        if by_distance is not None and ratio is not None and ratio >= CLEARLY and better > -2:
            if recognised or by_distance / ratio <= NEAR:
                found.append(Judgement(reading, ratio, True))
        elif better >= SIGNIFICANT and recognised and (ratio is None or ratio > 0.9):
            found.append(Judgement(reading, ratio, False))
    if not found:
        return None
    # Of those about as good as the best the one with the fewest changes.
    if by_distance is not None:
        best = max(judgement.ratio or 0 for judgement in found)
        close = [judgement for judgement in found if (judgement.ratio or 0) >= 0.95 * best]
    else:
        most = max(judgement.reading.agreement or 0 for judgement in found)
        close = [judgement for judgement in found if (judgement.reading.agreement or 0) >= 0.95 * most]
    return min(close, key=lambda judgement: len(judgement.reading.hypothesis.changes))


def preference(hits: Tensor | None, others: Tensor | None) -> float:
    """Standard errors by which one answer is right where the other is wrong (McNemar's test); 0 without labels."""
    if hits is None or others is None:
        return 0.0
    gained, lost = int((hits & ~others).sum()), int((~hits & others).sum())
    return (gained - lost) / math.sqrt(gained + lost) if gained + lost else 0.0


def above_chance(reading: Reading) -> bool:
    """Whether the teacher names the classes that were asked for better than by chance, by SIGNIFICANT errors."""
    return reading.hits is not None and beyond_chance(reading.hits, reading.look.probabilities.shape[1])


def unrecognised(reading: Reading, asked: Tensor) -> list[int]:
    """Of the classes asked for [N], those whose images the teacher names no better than by chance, by 2 errors."""
    if reading.hits is None:
        return sorted(set(asked.tolist()))
    chance = 1 / reading.look.probabilities.shape[1]
    labels = []
    for label in sorted(set(asked.tolist())):
        hits = reading.hits[asked == label].float()
        if hits.mean().item() <= chance + 2 * math.sqrt(chance * (1 - chance) / len(hits)):
            labels.append(label)
    return labels


def beyond_chance(hits: Tensor, classes: int) -> bool:
    """Whether more than 1 in ``classes`` of the hits [N] are true, by SIGNIFICANT standard errors and twice as many."""
    share, chance = hits.float().mean().item(), 1 / classes
    error = math.sqrt(chance * (1 - chance) / len(hits))
    return share > chance + SIGNIFICANT * error and share * len(hits) >= 5
