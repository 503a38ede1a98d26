"""Which synthetic images the student learns from, and how often it sees each.

Weights are a function of the stored images, the teacher's kept answers, and the student that the round before left: no
state, so that a resumed run draws the same batches.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.batches import Batches
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.diversity import COMPARED_AT_ONCE, thumbnails
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.logits import TOGETHER, Logits, answers, to_float
from diffdfkd.engine.selection_recipe import SelectionRecipe

UNIT = 2**20
"""Weights are counted in this part of their mean: sums of whole numbers are exact, and last bits do not count."""
LEAST_MASS = 0.5
"""Images' worth of the teacher's probability below which a class is not balanced: there is nothing to draw it from."""
SCALINGS = 200
BALANCED = 1e-6
"""Relative miss of a class's total at which balancing ends."""
TOLERATED = 0.05
"""Miss above which a word is said."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Of N images, of which some may be held back from training for other reasons."""

    weights: Tensor
    """[N] float64, whole numbers; 0 for an image that is dropped or held back."""
    dropped: dict[str, int]
    """Images by the field of the recipe that dropped them, the first one that did."""
    disagreement: float | None
    """Mean KL(teacher || student) over the images kept; None where it was not asked for."""
    unbalanced: list[int]
    """Classes of which the teacher sees less than half an image, so that no weight makes up for it."""
    balance_miss: float | None
    """Largest relative distance of a balanced class's total from what it should be."""

    @property
    def kept(self) -> int:
        return int((self.weights > 0).sum())

    @property
    def effective(self) -> float:
        """Effective sample size (Kish 1965), (sum w)^2 / sum w^2: the images kept, where all weigh the same."""
        return float(self.weights.sum() ** 2 / self.weights.square().sum())

    def event(self) -> dict[str, Any]:
        """JSON-ready, for the journal."""
        found = {"kept": self.kept, "dropped": self.dropped, "effective_sample_size": round(self.effective, 1)}
        more = {"disagreement": self.disagreement, "unbalanced": self.unbalanced, "balance_miss": self.balance_miss}
        return found | {name: value for name, value in more.items() if value not in (None, [])}


def select(
    recipe: SelectionRecipe,
    batches: Batches,
    logits: Logits,
    student: Classifier | None = None,
    *,
    dtype: str,
    device: torch.device,
) -> Selection:
    """By the images of `batches` that are trained on and the teacher's answers `logits` to all.

    `student` is that of the round before; without one disagreement does not count. Raises UserError where less than a
    batch of images is left.
    """
    candidates = batches.trained_on()
    kept, dropped = candidates, {}
    if recipe.by_confidence:
        low, high = recipe.confidence
        top = torch.cat([shares.max(1).values for shares in _shares(logits, kept)])
        kept = kept[(top >= low) & (top <= high)]
        dropped["confidence"] = len(candidates) - len(kept)
    if recipe.duplicates > 0 and len(kept):
        small = torch.cat([thumbnails(batches.read_images(part)) for part in kept.split(TOGETHER)])
        first = ~repeated(small.to(device), recipe.duplicates)
        dropped["duplicates"] = len(kept) - int(first.sum())
        kept = kept[first]
    if any(dropped.values()) and len(kept) < batches.batch_size:
        raise _too_few(recipe, len(kept), len(candidates), batches.batch_size, dropped)
    weights, disagreement = torch.ones(len(kept), dtype=torch.float64), None
    if student is not None and recipe.disagreement > 0:
        divergence = _disagreement(student, batches, logits, kept, dtype, device)
        weights += recipe.disagreement * divergence
        disagreement = round(divergence.mean().item(), 6)
    unbalanced: list[int] = []
    miss = None
    if recipe.balance > 0:
        weights, unbalanced, miss = balanced(weights, torch.cat(list(_shares(logits, kept))), recipe.balance)
        if miss > TOLERATED:
            log.warning(
                "selection.balance: no weights bring the classes nearer than %.0f %% to what it asks for, since the "
                "teacher is too unsure of these images; lower it, or leave it out",
                100 * miss,
            )
    whole = torch.zeros(batches.images, dtype=torch.float64)
    whole[kept] = (weights / weights.mean() * UNIT).round().clamp(min=1)
    return Selection(whole, dropped, disagreement, unbalanced, miss)


def repeated(small: Tensor, distance: float) -> Tensor:
    """[N] bool on the CPU: which thumbnails [N, D] are nearer than `distance` to an earlier one that is not so marked.

    In order, so that what is kept stays kept when images are appended.
    """
    found = torch.zeros(len(small), dtype=torch.bool)
    distinct, count = torch.empty_like(small), 0
    for first in range(0, len(small), COMPARED_AT_ONCE):
        block = small[first : first + COMPARED_AT_ONCE]
        near = torch.zeros(len(block), dtype=torch.bool)
        if count:
            near = (torch.cdist(block, distinct[:count]).amin(1) < distance).cpu()
        within = (torch.cdist(block, block) < distance).cpu()
        for row in range(len(block)):
            near[row] |= (within[row, :row] & ~near[:row]).any()
        found[first : first + len(block)] = near
        fresh = block[~near.to(small.device)]
        distinct[count : count + len(fresh)] = fresh
        count += len(fresh)
    return found


def balanced(weights: Tensor, shares: Tensor, strength: float) -> tuple[Tensor, list[int], float]:
    """Weights [n] moved towards equal totals of the classes in the teacher's probabilities `shares` [n, K].

    The total of a class is the weighted sum of its probabilities, m at first; wanted is m^(1 - strength), rescaled.
    Found are the weights nearest to the given ones in relative entropy, by generalized iterative scaling (Darroch and
    Ratcliff 1972, Ann. Math. Stat. 43): w exp(shares @ factors), each factor raised by the log of wanted over found.
    For a teacher that is sure of every image one step is exact. Classes below LEAST_MASS keep their factor. Also
    returns those, and the largest relative miss that is left: above 0 where no weights would do, as for a teacher that
    answers the same to all images.
    """
    masses = weights @ shares
    seen = masses >= LEAST_MASS * weights.mean()
    wanted = masses[seen] ** (1 - strength)
    wanted *= masses[seen].sum() / wanted.sum()
    factors = torch.zeros_like(masses)
    for _ in range(SCALINGS):
        powers = shares @ factors
        moved = weights * torch.exp(powers - powers.max())
        moved *= weights.sum() / moved.sum()
        ratio = wanted / (moved @ shares)[seen]
        miss = (ratio - 1).abs().max().item()
        if miss < BALANCED:
            break
        factors[seen] += ratio.log()
    return moved, (~seen).nonzero().flatten().tolist(), round(miss, 6)


def _shares(logits: Logits, indices: Tensor) -> Iterator[Tensor]:
    """The teacher's probabilities float64 [n, K] for the images at these indices, some at a time."""
    for part in indices.split(TOGETHER):
        yield logits.read(part).double().softmax(1)


@torch.no_grad()
def _disagreement(
    student: Classifier, batches: Batches, logits: Logits, indices: Tensor, dtype: str, device: torch.device
) -> Tensor:
    """KL(teacher || student) float64 [n] at temperature 1 for the stored images at these indices."""
    training = student.training
    student.to(device).eval()
    found = []
    for part in indices.split(TOGETHER):
        images = to_float(batches.read_images(part), device).contiguous(memory_format=torch.channels_last)
        theirs = answers(student, images, dtype).double().cpu().log_softmax(1)
        own = logits.read(part).double().log_softmax(1)
        found.append(functional.kl_div(theirs, own, reduction="none", log_target=True).sum(1).clamp(min=0))
    student.train(training)
    return torch.cat(found)


def _too_few(recipe: SelectionRecipe, kept: int, images: int, batch: int, dropped: dict[str, int]) -> UserError:
    values: dict[str, float | Sequence[float]] = {"confidence": recipe.confidence, "duplicates": recipe.duplicates}
    reasons = ", ".join(
        f"{count:,} by selection.{name}={list(value) if isinstance(value := values[name], tuple) else value}"
        for name, count in dropped.items()
    )
    return UserError(
        f"selection: leaves {kept:,} of {images:,} images, fewer than one batch (distillation.batch_size={batch}); "
        f"dropped were {reasons}; widen them, or make more images"
    )
