"""Fan-out: a batch of B trajectories forks at a late step into m batches of B children, which run the rest each.

The first batch of children is the trajectories themselves. In all others each child begins with a box of another
trajectory's latent in its own, signal, noise and stored x0 alike; then it goes its own way.
"""

from dataclasses import replace

import torch
from torch import Tensor

from diffdfkd.engine.cutmix import Branch, CutMixPlan, Tail, draw_boxes, plan_cutmix
from diffdfkd.engine.recipe import CutMixRecipe
from diffdfkd.kernels.advance import Advance
from diffdfkd.kernels.box import box_mask, check_boxes
from diffdfkd.kernels.philox import FORK, philox_uniform


def plan_fan_out(
    recipe: CutMixRecipe,
    classes: Tensor,
    n_classes: int,
    steps: int,
    size: tuple[int, int],
    seed: int,
    ids: Tensor,
    fork: int,
) -> CutMixPlan:
    """Plan of ``classes`` [B], with a tail for each batch of children after the first; ``ids`` [m, B] are global.

    ``fork`` is the number of steps before the children part. Partners and boxes are drawn from (seed, id of the child)
    by the recipe's partner rule and alpha; a child for whom there is no partner repeats its parent. As `plan_cutmix`.
    """
    device, ids = classes.device, ids.cpu().long()
    own = classes.cpu().long()
    plan = plan_cutmix(recipe, own, n_classes, steps, size, seed, ids[0])
    tails = []
    for children in ids[1:]:
        uniform = philox_uniform(seed, children, fork, FORK, 5)
        # At least a pixel: without a box a child would be its parent.
        partners, boxes = draw_boxes(recipe, own, size, uniform, 1.0, least=1 / min(size) ** 2)
        check_boxes(boxes, partners, *size)
        branch = Branch(fork, children, partners, boxes)
        tails.append(Tail(branch, plan_cutmix(recipe, own, n_classes, steps, size, seed, ids[0], branch)))
    return replace(plan, tails=tuple(tails)).to(device)


def branched(trunk: Advance, branch: Branch) -> Advance:
    """State of the children as they leave the trunk.

    As in `kernels.advance`, who is not alive neither gives nor takes a patch, and who was to take one from it is not
    alive either.
    """
    z, x0, alive = trunk
    boxes, giving = branch.boxes, alive[branch.partners]
    mixed = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    inside = box_mask(boxes, *z.shape[2:]) & (alive & giving)[:, None, None, None]

    def taken(latents: Tensor) -> Tensor:
        made = torch.where(inside, latents[branch.partners], latents)
        return made.contiguous(memory_format=torch.channels_last)

    return Advance(taken(z), None if x0 is None else taken(x0), alive & (giving | ~mixed))
