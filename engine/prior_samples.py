"""Clean latents as the prior's unguided trajectories predict them on their way: what guidance decodes, of no data."""

import torch
from torch import Tensor

from diffdfkd.engine.cheap_steps import prompt_alone_steps
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.loop import Alone
from diffdfkd.engine.micro_batches import unet_in_parts
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.prompts import class_prompts, draw_prompts, embed_prompts
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe, Recipe
from diffdfkd.engine.sampler import sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Gradient, finite, unet_stage
from diffdfkd.kernels.philox import INITIAL_NOISE, philox_normal

OUTSIDE = 2**59
"""First sample id of those that no run has: a round's begin at round * 2**40."""


def sample_classes(ids: Tensor, classes: int) -> Tensor:
    """Classes [n] int64 of such samples, in turn."""
    return ids % classes


@torch.no_grad()
def predicted_latents(recipe: Recipe, prior: Prior, ids: Tensor) -> Tensor:
    """x0 [S, B, c, h, w] float32 as predicted in each step of the unguided trajectories of samples ``ids`` [B] int64.

    By the recipe's prompts, sampler, steps, guidance scale and seed; the UNet in eager mode.
    """
    synthesis = recipe.synthesis
    device = next(prior.unet.parameters()).device
    ids = ids.to(device)
    classes = sample_classes(ids, len(recipe.teacher.classes))
    embeddings, rows = embed_prompts(prior, class_prompts(recipe))
    context = embeddings[rows[draw_prompts(recipe, ids, classes).to(device)]]
    scale = 1.0 if prior.guidance_width is not None else synthesis.guidance_scale
    if scale != 1:
        context = torch.cat([embeddings[-1:].expand_as(context), context])
    seen: list[Tensor] = []

    def watch(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor | None = None) -> Gradient:
        """A chain that looks on: without a gradient nothing moves."""
        seen.append(x0.clone())
        nothing = torch.zeros(len(x0), device=x0.device)
        return Gradient(torch.zeros_like(x0), nothing, finite(x0), torch.zeros(4, device=x0.device))

    unet = unet_stage(prior, getattr(torch, recipe.prior.dtype), synthesis.guidance_scale)
    if (size := recipe.guidance.micro_batch) is not None:
        unet = unet_in_parts(unet, size)
    sample(
        unet,
        make_table(synthesis.sampler, prior.scheduler_config, synthesis.steps, device),
        context,
        scale=scale,
        noise=philox_normal(recipe.seed, ids, 0, INITIAL_NOISE, prior.latent_shape),
        sample_ids=ids,
        seed=recipe.seed,
        guidance=GuidanceRecipe(mode="clean", rho_rule="raw"),
        plan=plan_cutmix(
            CutMixRecipe(),
            classes,
            len(recipe.teacher.classes),
            synthesis.steps,
            prior.latent_shape[1:],
            recipe.seed,
            ids,
        ),
        chain=watch,
        alone=Alone(prompt_alone_steps(synthesis), unet) if scale != 1 else None,
        kernel=recipe.kernel,
    )
    return torch.stack(seen)
