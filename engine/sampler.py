"""The guided denoising loop over stages; it knows nothing of files, ranks or models.

A guided step is UNet -> predict -> guidance chain -> advance in mode ``clean``. Modes ``exact`` (as published:
DiffDFKD, arXiv 2504.00870) and ``reuse`` take the gradient through the UNet as well and move z in the place of x0.
Nothing in the loop waits for the device: what Python branches on is decided before it.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.schedule import Table
from diffdfkd.engine.stages import Chain, UNet, finite
from diffdfkd.kernels.advance import advance, step_size
from diffdfkd.kernels.philox import STEP_NOISE, philox_normal
from diffdfkd.kernels.predict import Prediction, predict
from diffdfkd.kernels.row import COLUMNS, named


@dataclass(frozen=True)
class Trajectory:
    """Where a batch of B samples ended after S steps."""

    latents: Tensor
    """[B, c, h, w] float32, clean."""
    alive: Tensor
    """[B] bool; false for samples that became non-finite, or took a patch from one: to be dropped."""
    targets: Tensor
    """[B, K] float32, soft labels after all mixes."""
    losses: Tensor
    """[S, 4], total, class, BatchNorm and adversarial loss per step; NaN where a step was not guided."""


@torch.no_grad()
def sample(
    unet: UNet,
    table: Table,
    context: Tensor,
    *,
    scale: Tensor | float,
    noise: Tensor,
    sample_ids: Tensor,
    seed: int,
    guidance: GuidanceRecipe,
    plan: CutMixPlan,
    chain: Chain | None = None,
) -> Trajectory:
    """Latents from unit noise [B, c, h, w] by the table's sampler, steered by ``chain`` as ``guidance`` says.

    ``context`` [2B, T, D], unconditional half first, with guidance scale ``scale`` (a number or [B]); or [B, T, D] with
    scale 1. ``sample_ids`` int64 [B] and ``seed`` draw the noise of stochastic samplers. Without a chain nothing is
    guided. Modes ``exact`` and ``reuse`` need a UNet stage that autograd can cross.
    """
    batch, channels, height, width = noise.shape
    shape, device = (channels, height, width), noise.device
    rows = table.rows.to(device)
    timesteps = table.timesteps.to(device)
    noisy, multistep = ((rows[:, COLUMNS.index(name)] != 0).tolist() for name in ("noise", "previous"))
    guided = guided_steps(guidance, len(rows)) if chain is not None else [False] * len(rows)
    partners, boxes, targets = plan.partners.to(device), plan.boxes.to(device), plan.targets.to(device)
    sample_ids = sample_ids.to(device)

    z = noise.float() * table.initial_scale
    inputs = torch.empty((len(context), *shape), dtype=z.dtype, device=device, memory_format=torch.channels_last)
    write_inputs(inputs, z, rows[0])
    previous_x0 = None
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    unguided = torch.full((4,), torch.nan, device=device)
    losses = []

    for step, row in enumerate(rows.unbind()):
        call = partial(unet, timestep=timesteps[step].expand(len(context)), context=context)
        gradient = size = None
        loss = unguided
        if chain is not None and guided[step] and guidance.mode != "clean":
            z, prediction, alive, loss = guide_latent(
                call, chain, z, inputs, row, scale=scale, targets=targets[step], alive=alive, guidance=guidance
            )
        else:
            prediction = predict(z, call(inputs), row, scale)
            alive = alive & torch.isfinite(prediction.x0_norm)
            if chain is not None and guided[step]:
                gradient, norm, usable, loss = chain(prediction.x0, targets[step], alive)
                alive = alive & usable
                size = step_size(
                    guidance.rho_rule, guidance.rho, norm, prediction.x0_norm, prediction.guidance_norm, scale, row
                )
        losses.append(loss)
        last = step + 1 == len(rows)
        z, kept_x0 = advance(
            z,
            prediction.eps_hat,
            prediction.x0,
            previous_x0,
            row,
            gradient=gradient,
            step_size=size,
            alive=alive,
            noise=philox_normal(seed, sample_ids, step, STEP_NOISE, shape) if noisy[step] else None,
            partners=partners[step] if plan.mixes[step] else None,
            boxes=boxes[step] if plan.mixes[step] else None,
            out_input=None if last else inputs,
            next_input_scale=1.0 if last else named(rows[step + 1]).input_scale,
        )
        previous_x0 = kept_x0 if not last and multistep[step + 1] else None
        if plan.mixes[step]:
            # A patch that was due from a frozen partner did not come: the planned label would be wrong.
            alive = alive & alive[partners[step]]

    return Trajectory(z, alive & finite(z), targets[-1], torch.stack(losses))


def guide_latent(
    unet: partial[Tensor],
    chain: Chain,
    z: Tensor,
    inputs: Tensor,
    row: Tensor,
    *,
    scale: Tensor | float,
    targets: Tensor,
    alive: Tensor,
    guidance: GuidanceRecipe,
) -> tuple[Tensor, Prediction, Tensor, Tensor]:
    """Modes ``exact`` and ``reuse``: z moved against dL/dz, through decoder and UNet, before the sampler's step.

    ``inputs`` [B or 2B, c, h, w] hold the UNet's input at ``z`` and, in ``exact``, that at the new z afterwards.
    Returns the new z, the prediction there (``exact``: of a second UNet call; ``reuse``: with eps_hat held), alive and
    losses. The rho rules apply to the UNet's input y = input_scale z, so that Euler, whose z grows with sigma, is
    guided like the others, for which y is z.
    """
    coefficients = named(row)
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        output = unet(leaf)
    prediction = predict(z, output.detach(), row, scale)
    alive = alive & torch.isfinite(prediction.x0_norm)
    by_x0, _, usable, losses = chain(prediction.x0, targets, alive)
    (by_inputs,) = torch.autograd.grad(output, leaf, _cotangent(by_x0, row, scale, doubled=len(inputs) > len(z)))
    # y enters x0 directly and through each half of the UNet's batch.
    gradient = coefficients.x0_z / coefficients.input_scale * by_x0 + by_inputs.unflatten(0, (-1, len(z))).sum(0)
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
    alive = alive & usable & torch.isfinite(norm)
    y_norm = coefficients.input_scale * torch.linalg.vector_norm(z, dim=(1, 2, 3))
    size = step_size(guidance.rho_rule, guidance.rho, norm, y_norm, prediction.guidance_norm, scale, row, of="z")
    move = torch.where(alive[:, None, None, None], size[:, None, None, None] * gradient, 0)  # of y
    z = z - move / coefficients.input_scale
    if guidance.mode == "reuse":
        # y = alpha x0 + sigma eps_hat; where nothing but noise is left (alpha 0), eps_hat alone says nothing of x0.
        per_y = torch.where(coefficients.alpha > 0, 1 / coefficients.alpha, 0)
        x0 = prediction.x0 - per_y * move
        prediction = prediction._replace(x0=x0, x0_norm=torch.linalg.vector_norm(x0, dim=(1, 2, 3)))
    else:
        write_inputs(inputs, z, row)
        prediction = predict(z, unet(inputs), row, scale)
    return z, prediction, alive & torch.isfinite(prediction.x0_norm), losses


def write_inputs(inputs: Tensor, z: Tensor, row: Tensor) -> None:
    """The UNet's input at z [B, c, h, w], once or twice over, into ``inputs`` [B or 2B, c, h, w]."""
    inputs.unflatten(0, (-1, len(z))).copy_((named(row).input_scale * z).expand(len(inputs) // len(z), *z.shape))


def _cotangent(by_x0: Tensor, row: Tensor, scale: Tensor | float, *, doubled: bool) -> Tensor:
    """dL/d(UNet output) from dL/dx0, through x0 = x0_z z + x0_m m and classifier-free guidance."""
    by_output = named(row).x0_m * by_x0
    if not doubled:
        return by_output
    weight = scale[:, None, None, None] if isinstance(scale, Tensor) else scale
    return torch.cat([(1 - weight) * by_output, weight * by_output])
