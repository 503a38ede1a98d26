"""Weight selection: a student that begins with a part of its teacher's own weights.

After Xu et al., "Initializing Models with Larger Ones" (ICLR 2024, arXiv 2311.18823): a narrower or shallower network
of the teacher's family takes the tensors of the same names, of each wider one the chosen channels. There channels are
evenly spaced; here they are those of the largest norms, one choice for all dimensions of the same two sizes.

Whether names and sizes say which channels belong together is proven by value for each pair of networks: a student of
arbitrary weights, laid into a teacher that is silent elsewhere, must answer there as it does by itself. Networks that
join channels otherwise (concatenated, shuffled, normalised over all channels) fail that, and are refused.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError

Sizes = tuple[int, int]
"""Of one dimension: the teacher's, the student's."""

MOST_APART = 1e-3
"""Of the two answers, relative to the student's; rounding parts them by 1e-6, a wrong channel by nearly as much as they
are."""


@dataclass(frozen=True)
class Joint:
    """One dimension of a tensor along which the student is narrower."""

    name: str
    dimension: int
    sizes: Sizes
    """Of the channels that are chosen."""
    pixels: int
    """How many entries in a row belong to a channel: more than one behind a flattened image."""


def select_weights(student: nn.Module, teacher: nn.Module, image: tuple[int, int, int]) -> None:
    """Overwrite the student's weights and buffers with their counterparts in the teacher, for images of shape [C,H,W].

    A counterpart has the same name and number of dimensions, is no smaller in its first two (outputs and inputs), and
    equal in the others. The teacher is left as it is; equal teachers give equal weights. Raises UserError where a
    weight has no counterpart, or where the student is no part of such a teacher.
    """
    given, own = teacher.state_dict(), student.state_dict()
    wanted = {name: value for name, value in own.items() if _counterpart(value, given.get(name))}
    lacking = [name for name, _ in student.named_parameters() if name not in wanted]
    if lacking:
        raise UserError(
            f"student.initialization: teacher, but {len(lacking)} of the student's weights have no counterpart of the "
            f"same name and no smaller in it ({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}); "
            "take a narrower or shallower network of the teacher's family, or student.initialization=random"
        )
    joints = list(_joints(wanted, given))
    if not joints and len(wanted) == len(given):
        raise UserError(
            "student.initialization: teacher, but the student is as wide and as deep as the teacher, and would be its "
            "copy; take a narrower or shallower network, or student.initialization=random"
        )
    picks = _picks(joints, given)
    if not _is_part(student, teacher, set(wanted), picks, image):
        raise UserError(
            "student.initialization: teacher, but the student is no part of such a teacher: channels or layers are "
            "joined otherwise than names and sizes tell (concatenated, shuffled, normalised all together, another "
            "shortcut); take a network of its family that is only shallower, or student.initialization=random"
        )
    taken = {name: given[name] for name in wanted}
    for (name, dimension), index in picks.items():
        taken[name] = taken[name].index_select(dimension, index.to(taken[name].device))
    student.load_state_dict({**own, **taken})


def _counterpart(student: Tensor, teacher: Tensor | None) -> bool:
    if teacher is None or teacher.ndim != student.ndim:
        return False
    if not student.is_floating_point():
        return teacher.shape == student.shape
    wide_enough = all(ours <= theirs for ours, theirs in zip(student.shape[:2], teacher.shape[:2], strict=True))
    return wide_enough and student.shape[2:] == teacher.shape[2:]


def _joints(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[Joint]:
    image: Sizes | None = None  # outputs of the convolution before, in the order of registration
    for name, value in wanted.items():
        for dimension in range(min(2, value.ndim)):
            sizes = (given[name].shape[dimension], value.shape[dimension])
            if sizes[0] == sizes[1]:
                continue
            pixels = 1
            if dimension == 1 and value.ndim == 2 and image is not None and image[0] != image[1]:
                count = sizes[0] // image[0]
                if sizes == (count * image[0], count * image[1]):
                    sizes, pixels = image, count
            yield Joint(name, dimension, sizes, pixels)
        if value.ndim >= 2:
            image = (given[name].shape[0], value.shape[0]) if value.ndim > 2 else None


def _picks(joints: list[Joint], given: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """For each tensor and dimension along which the student is narrower, which of the teacher's entries it takes.

    A channel's score: its shares of the squared norms of the weights that it enters or leaves, summed over all that
    have these sizes. Those of the highest scores are taken, in their order.
    """
    scores: dict[Sizes, Tensor] = {}
    for joint in joints:
        score = scores.setdefault(joint.sizes, torch.zeros(joint.sizes[0], dtype=torch.float64))
        weight = given[joint.name].detach().double().cpu()
        if weight.ndim >= 2:
            energy = weight.square().transpose(0, joint.dimension).reshape(joint.sizes[0], -1).sum(1)
            score += energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    chosen = {
        sizes: score.argsort(descending=True, stable=True)[: sizes[1]].sort()[0] for sizes, score in scores.items()
    }
    return {
        (joint.name, joint.dimension): (
            chosen[joint.sizes][:, None] * joint.pixels + torch.arange(joint.pixels)
        ).flatten()
        for joint in joints
    }


def _is_part(
    student: nn.Module,
    teacher: nn.Module,
    wanted: Collection[str],
    picks: Mapping[tuple[str, int], Tensor],
    image: tuple[int, int, int],
) -> bool:
    """Whether a student of arbitrary weights answers alike by itself and inside a teacher that is silent elsewhere."""
    alone, within = copy.deepcopy(student).float().cpu().eval(), copy.deepcopy(teacher).float().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    state, places = within.state_dict(), _silent(within)
    for name, value in alone.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = torch.rand(value.shape, generator=generator)
        if value.ndim < 2:  # scales, shifts and statistics, away from the one and nought of a new network
            value.copy_(0.5 + drawn)
        elif not value.any():
            value.copy_(0.1 * (drawn - 0.5))
        if name not in wanted:
            continue
        index = [picks.get((name, dimension), torch.arange(size)) for dimension, size in enumerate(value.shape[:2])]
        if value.ndim == 0:
            places[name] = value
        elif value.ndim == 1:
            places[name][index[0]] = value
        else:
            places[name][index[0][:, None], index[1]] = value
    within.load_state_dict({**state, **places})
    images = torch.randn(4, *image, generator=generator)
    with torch.no_grad():
        here, there = alone(images), within(images)
    spread = (here - here.mean(0)).abs().max()  # the answers must depend on the image
    return bool(spread > 0 and (here - there).abs().max() <= MOST_APART * here.abs().max())


def _silent(network: nn.Module) -> dict[str, Tensor]:
    """Of every floating-point tensor one of noughts; variances, by which is divided, are one."""
    return {
        name: torch.ones_like(value) if name.endswith("running_var") else torch.zeros_like(value)
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
