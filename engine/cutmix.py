"""Latent CutMix: who takes which box from whom, after which step, and what that does to the labels.

After a mixed step a box of a sample's latent is replaced by the same box of its partner's. Everything is drawn before
the loop, from (seed, sample, step) alone; the kernel of the step only reads the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import CutMixRecipe
from diffdfkd.kernels.box import box_from_area, box_mask, box_share, check_boxes
from diffdfkd.kernels.philox import CUTMIX, philox_uniform


class Parent(NamedTuple):
    """One patch that a sample took."""

    step: int
    partner: int
    """Global id of the sample that the patch came from."""
    box: tuple[int, int, int, int]
    """(top, left, bottom, right) in latent pixels, half open."""
    area: float
    """Share of the latent inside the box."""


class Repair(NamedTuple):
    """Masked re-denoising of the seams, after RePaint (Lugmayr et al., 2022, arXiv 2201.09865)."""

    band: int
    """Latent pixels on either side of a box's border that are denoised again."""
    passes: int


class Branch(NamedTuple):
    """How the children of a batch leave its trunk (engine/fan_out.py)."""

    step: int
    """Steps of the trunk: the first that the children run for themselves."""
    ids: Tensor
    """[B] int64, of the children."""
    partners: Tensor
    """[B] int64, index in the batch of the sample whose box is taken; itself: none is."""
    boxes: Tensor
    """[B, 4] int32, as in the plan."""

    def to(self, device: torch.device) -> "Branch":
        return Branch(self.step, self.ids.to(device), self.partners.to(device), self.boxes.to(device))


class Tail(NamedTuple):
    """The rest of a trajectory that B children run."""

    branch: Branch
    plan: "CutMixPlan"
    """Of all steps; those of the trunk are as in the trunk's plan."""


@dataclass(frozen=True)
class CutMixPlan:
    """CutMix of a batch of B samples over S steps."""

    partners: Tensor
    """[S, B] int64, index in the batch; a sample that is not mixed is its own partner."""
    boxes: Tensor
    """[S, B, 4] int32 (top, left, bottom, right), half open; all 0 where a sample is not mixed."""
    targets: Tensor
    """[S + 1, B, K] float32 soft labels, row s before the mix of step s; the last row is final."""
    mixes: tuple[bool, ...]
    """Per step: whether any sample is mixed after it. On the host, so that the loop need not ask the device."""
    parents: tuple[tuple[Parent, ...], ...]
    """Per sample, in the order of the steps."""
    size: tuple[int, int]
    """Height and width of the latents."""
    shares: Mapping[int, Tensor] = field(default_factory=dict)
    """Where prompts are blended: by the step from which it holds, the share [B, B] of each sample's pixels that came
    from each sample of the batch. Before the first all is everyone's own."""
    repair: Repair | None = None
    tails: tuple[Tail, ...] = ()
    """The batches of children after the first, which is what this plan itself ends in."""

    @property
    def lineage(self) -> tuple[tuple[Parent, ...], ...]:
        """Parents of all that the trajectory ends in: of the batch itself, then tail by tail."""
        return self.parents + tuple(parents for tail in self.tails for parents in tail.plan.parents)

    @property
    def blends(self) -> bool:
        """Whether any step has another context than the one before."""
        return bool(self.shares) or any(tail.plan.shares for tail in self.tails)

    def __post_init__(self) -> None:
        """Raises ValueError for a box outside the latent or a partner outside the batch, of a plan on the CPU.

        Here, where it costs nothing, and not in the step, which reads the plan on the device.
        """
        if self.partners.device.type == "cpu":
            check_boxes(self.boxes, self.partners, *self.size)

    def to(self, device: torch.device) -> "CutMixPlan":
        """The same plan with its tensors on the device."""
        if self.partners.device == device:
            return self
        return replace(
            self,
            partners=self.partners.to(device),
            boxes=self.boxes.to(device),
            targets=self.targets.to(device),
            shares={step: shares.to(device) for step, shares in self.shares.items()},
            tails=tuple(Tail(tail.branch.to(device), tail.plan.to(device)) for tail in self.tails),
        )


def mixed_steps(recipe: CutMixRecipe, steps: int) -> list[int]:
    """Steps after which CutMix acts: each ``every``-th, never the last, since no step is left to repair the seam.

    Raises UserError where CutMix is on but would never act.
    """
    if not recipe.every:
        return []
    chosen = list(range(recipe.every - 1, steps - 1, recipe.every))
    if not chosen:
        raise UserError(
            f"cutmix.every: got {recipe.every} with synthesis.steps={steps}: a mix needs a later step to repair its "
            f"seam; set it to {steps - 1} or less, or to 0"
        )
    return chosen


def plan_cutmix(
    recipe: CutMixRecipe,
    classes: Tensor,
    n_classes: int,
    steps: int,
    size: tuple[int, int],
    seed: int,
    sample_ids: Tensor,
    branch: Branch | None = None,
) -> CutMixPlan:
    """Plan for samples of ``classes`` [B] with global ``sample_ids`` [B], on latents of ``size`` (h, w).

    A pure function of its arguments, computed on the CPU and returned on the device of ``classes``. A label is the
    share of each class in the latent, counted pixel by pixel after clipping and rounding and over all earlier mixes.
    With a ``branch`` (on the CPU) it is that of its children, who take its boxes between two steps and are drawn by
    their own ids from then on.
    """
    device = classes.device
    classes, sample_ids = classes.cpu().long(), sample_ids.cpu().long()
    batch, (height, width) = len(classes), size
    own = torch.arange(batch)
    partners = own.repeat(steps, 1)
    boxes = torch.zeros(steps, batch, 4, dtype=torch.int32)
    targets = torch.empty(steps + 1, batch, n_classes)
    owners = own.view(batch, 1, 1).expand(batch, height, width)  # sample that each latent pixel came from
    parents: list[list[Parent]] = [[] for _ in range(batch)]
    shares: dict[int, Tensor] = {}

    def take(step: int, partners: Tensor, boxes: Tensor, ids: Tensor) -> Tensor:
        """Owners after a mix, which is noted."""
        areas = box_share(boxes, height, width).tolist()
        for sample in (partners != own).nonzero().flatten().tolist():
            top, left, bottom, right = boxes[sample].tolist()
            parents[sample].append(Parent(step, int(ids[partners[sample]]), (top, left, bottom, right), areas[sample]))
        return torch.where(box_mask(boxes, height, width)[:, 0], owners[partners], owners)

    chosen = set(mixed_steps(recipe, steps))
    targets[0] = _shares(classes[owners], n_classes)
    for step in range(steps):
        ids = sample_ids if branch is None or step < branch.step else branch.ids
        before = owners
        if step in chosen:
            uniform = philox_uniform(seed, ids, step, CUTMIX, 5)
            partners[step], boxes[step] = draw_boxes(recipe, classes, size, uniform, recipe.probability)
            owners = take(step, partners[step], boxes[step], ids)
        if branch is not None and step + 1 == branch.step:
            owners = take(step, branch.partners, branch.boxes, sample_ids)
        # The last step never mixes.
        targets[step + 1] = targets[step] if owners is before else _shares(classes[owners], n_classes)
        if owners is not before and recipe.prompt == "blend":
            shares[step + 1] = _shares(owners, batch)
    return CutMixPlan(
        partners=partners,
        boxes=boxes,
        targets=targets,
        mixes=tuple((partners != own).any(1).tolist()),
        parents=tuple(tuple(own_parents) for own_parents in parents),
        size=size,
        shares=shares,
        repair=Repair(recipe.band, recipe.passes) if recipe.repair == "masked" else None,
    ).to(device)


def draw_boxes(
    recipe: CutMixRecipe,
    classes: Tensor,
    size: tuple[int, int],
    uniform: Tensor,
    probability: float,
    least: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Partners [B] and boxes [B, 4] of one mix from uniforms [B, 5]; no partner or an empty box: not mixed.

    ``least`` is the smallest share of the area that a box is asked to have.
    """
    own = torch.arange(len(classes))
    same = classes[:, None] == classes[None, :]
    candidates = {"within": same, "across": ~same, "any": torch.ones_like(same)}[recipe.partner]
    candidates = candidates & ~torch.eye(len(classes), dtype=torch.bool)
    counts = candidates.sum(1)
    # The k-th candidate of each row, k uniform.
    rank = (uniform[:, 1] * counts).long().clamp(max=(counts - 1).clamp(min=0))
    partner = ((candidates.cumsum(1) == rank[:, None] + 1) & candidates).int().argmax(1)
    area = (1 - beta_quantile(uniform[:, 2], recipe.alpha)).clamp(min=least)
    boxes = box_from_area(area, uniform[:, 3:5], *size)
    empty = box_share(boxes, *size) == 0
    mixed = (uniform[:, 0] < probability) & (counts > 0) & ~empty
    return torch.where(mixed, partner, own), torch.where(mixed[:, None], boxes, 0)


def beta_quantile(uniform: Tensor, alpha: float) -> Tensor:
    """Quantile function of Beta(alpha, alpha) in float64, so that a draw needs exactly one uniform number.

    By symmetry only [0, 1/2] is tabulated; below alpha 1, x = t^(1/alpha) / 2 takes out the pole of the density at 0.
    """
    power = 1 / min(alpha, 1)
    t = torch.linspace(0, 1, 4097, dtype=torch.float64)
    x = t**power / 2
    density = t ** (max(alpha, 1) - 1) * (2 * (1 - x)) ** (alpha - 1)  # of t, up to a factor
    cumulative = torch.cat([t.new_zeros(1), (density[1:] + density[:-1]).cumsum(0)])
    cumulative = cumulative / cumulative[-1]
    tail = 2 * torch.minimum(uniform, 1 - uniform)
    upper = torch.searchsorted(cumulative, tail).clamp(1, len(t) - 1)
    below, above = cumulative[upper - 1], cumulative[upper]
    share = ((tail - below) / (above - below).clamp(min=1e-300)).clamp(0, 1)
    half = (t[upper - 1] + share * (t[upper] - t[upper - 1])) ** power / 2
    return torch.where(uniform < 0.5, half, 1 - half)


def _shares(owners: Tensor, n: int) -> Tensor:
    """Share of each of n owners among the pixels [B, h, w] -> float32 [B, n]."""
    pixels = owners.flatten(1)
    counts = torch.zeros(len(pixels), n).scatter_add_(1, pixels, torch.ones(pixels.shape))
    return counts / pixels.shape[1]
