"""The guided denoising loop over stages; it knows nothing of files, ranks or models.

A guided step is UNet -> predict -> guidance chain -> advance in mode ``clean``. Modes ``exact`` (as published:
DiffDFKD, arXiv 2504.00870) and ``reuse`` take the gradient through the UNet as well and move z in the place of x0.
Nothing in the loop waits for the device: what Python branches on is decided before it, and which step it is the device
counts by itself. Between the stages of a clean step lie two launches, `predict` and `advance`, and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.cheap_steps import light_steps, whole_steps
from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.feature_reuse import shallow_form
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.schedule import Table
from diffdfkd.engine.stages import BufferedUNet, Chain, Gradient, UNet, Vjp, dense, finite
from diffdfkd.kernels.advance import Advance, advance
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.move import move
from diffdfkd.kernels.predict import Prediction, predict
from diffdfkd.kernels.row import row_at, start_counter
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput, write_input


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
    frozen: Tensor
    """[S] int32, samples that stopped being alive in each step, counted on the device."""


class Kind(NamedTuple):
    """What Python branches on in a step: steps of one kind are the same launches on the same tensors."""

    guided: bool
    light: bool
    """Guided through the light decoder."""
    draws: bool
    last: bool
    keep_x0: bool
    doubled: bool
    """With classifier-free guidance: the UNet's rows are twice the batch."""
    next_doubled: bool
    """Whether those of the next step are."""
    whole: bool
    """All of the UNet runs, and not its outermost blocks alone."""


class Alone(NamedTuple):
    """Steps in which the UNet runs on the prompt alone, without classifier-free guidance, and what serves them."""

    steps: Sequence[bool]
    unet: UNet
    """On B rows."""
    vjp: Vjp | None = None


class Lane(NamedTuple):
    """The UNet on one number of rows, with the buffers that it reads."""

    unet: UNet
    vjp: Vjp | None
    context: Tensor
    input: NextInput


def open_lane(unet: UNet, vjp: Vjp | None, context: Tensor, latent: Sequence[int], timesteps: Tensor) -> Lane:
    """Buffers for the rows of ``context`` and latents [c, h, w]: the UNet's own, where it has some."""
    if isinstance(unet, BufferedUNet):
        inputs, timestep, context = unet.claim(context)
    else:
        inputs = torch.zeros((len(context), *latent), device=context.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        timestep = torch.zeros(len(context), device=context.device)
    return Lane(unet, vjp, context, NextInput(inputs, timestep, timesteps))


@dataclass(frozen=True)
class Loop:
    """What all steps of a trajectory share, and the step of mode ``clean`` and of no guidance."""

    lanes: Mapping[bool, Lane]
    """By whether the rows are doubled."""
    rows: Tensor
    step: Tensor
    scales: Tensor
    draw: Draw
    mix: Mix | None
    frozen: Tensor
    guidance: GuidanceRecipe
    kernel: Kernel

    def begin(self, doubled: bool, z: Tensor) -> None:
        """Write the first step's input from the scaled noise."""
        following = self.lanes[doubled].input
        following.timestep.copy_(following.timesteps[0].expand_as(following.timestep))
        write_input(following.sample, row_at(self.rows, self.step[:1]).input_scale * z)

    def predict(self, z: Tensor, output: Tensor) -> Prediction:
        return predict(z, output, self.rows, self.step, self.scales, kernel=self.kernel)

    def steering(self, found: Gradient) -> Guidance:
        guidance = self.guidance
        return Guidance(found.gradient, found.norm, found.finite, self.scales, guidance.rho_rule, guidance.rho)

    def advance(
        self,
        kind: Kind,
        z: Tensor,
        prediction: Prediction,
        previous_x0: Tensor | None,
        alive: Tensor,
        steering: Guidance | None,
    ) -> Advance:
        return advance(
            z,
            prediction,
            previous_x0,
            self.rows,
            self.step,
            alive,
            guidance=steering,
            noise=self.draw if kind.draws else None,
            mix=self.mix,
            next_input=None if kind.last else self.lanes[kind.next_doubled].input,
            keep_x0=kind.keep_x0,
            frozen=self.frozen,
            kernel=self.kernel,
        )

    def clean_step(
        self, kind: Kind, chain: Chain | None, z: Tensor, previous_x0: Tensor | None, alive: Tensor, target: Tensor
    ) -> tuple[Advance, Tensor | None]:
        """(latents, x0 kept for the next step, who is alive), and the losses of a guided step."""
        lane = self.lanes[kind.doubled]
        unet = lane.unet if kind.whole else shallow_form(lane.unet)
        output = unet(lane.input.sample, lane.input.timestep, lane.context)
        prediction = self.predict(z, output)
        if chain is None:
            return self.advance(kind, z, prediction, previous_x0, alive, None), None
        gradient = chain(prediction.x0, target, alive)
        return self.advance(kind, z, prediction, previous_x0, alive, self.steering(gradient)), gradient.losses


def step_chains(
    guidance: GuidanceRecipe, steps: int, chain: Chain | None, light: Chain | None
) -> list[tuple[Chain | None, bool]]:
    """Per step the chain that guides it, None where none does, and whether it is the light decoder's.

    Raises ValueError where the one that a step needs is missing.
    """
    if chain is None and light is None:
        return [(None, False)] * steps
    chosen: list[tuple[Chain | None, bool]] = []
    for guided, is_light in zip(guided_steps(guidance, steps), light_steps(guidance, steps), strict=True):
        steers = light if is_light else chain
        if guided and steers is None:
            raise ValueError(f"{'light' if is_light else 'chain'}: missing, and a step of guidance.window needs it")
        chosen.append((steers, is_light) if guided else (None, False))
    return chosen


def step_kinds(
    table: Table, chains: Sequence[tuple[Chain | None, bool]], doubled: Sequence[bool], whole: Sequence[bool]
) -> list[Kind]:
    """What each step of the table is."""
    kinds = []
    for step, (chain, is_light) in enumerate(chains):
        last = step + 1 == table.steps
        kinds.append(
            Kind(
                guided=chain is not None,
                light=is_light,
                draws=table.draws[step],
                last=last,
                keep_x0=not last and table.looks_back[step + 1],
                doubled=doubled[step],
                next_doubled=not last and doubled[step + 1],
                whole=whole[step],
            )
        )
    return kinds


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
    light: Chain | None = None,
    kernel: Kernel = "auto",
    vjp: Vjp | None = None,
    alone: Alone | None = None,
    reuse_every: int = 1,
) -> Trajectory:
    """Latents from unit noise [B, c, h, w] by the table's sampler, steered by ``chain`` as ``guidance`` says.

    ``context`` [2B, T, D], unconditional half first, with guidance scale ``scale`` (a number or [B]); or [B, T, D] with
    scale 1. ``sample_ids`` int64 [B] and ``seed`` draw the noise of stochastic samplers. Without a chain nothing is
    guided. Modes ``exact`` and ``reuse`` need ``vjp``, or a UNet stage that autograd can cross. ``plan`` is
    `plan_cutmix`'s, for the table's steps. ``light`` guides in the steps of ``guidance.decoder_window``, where a light
    decoder is named. ``alone`` takes over in steps without classifier-free guidance. With ``reuse_every`` above 1 the
    UNet is a `ReusingUNet`: whole in each n-th step, and in those after a mix. ``kernel`` is the form of the operations
    between the stages: kernels/launch.py. Raises ValueError for a context or scale that does not fit.
    """
    batch, device = len(noise), noise.device
    doubled = len(context) == 2 * batch
    if len(context) not in (batch, 2 * batch):
        raise ValueError(f"context: got {len(context)} rows for {batch} latents; B or 2B of them")
    if not doubled and (isinstance(scale, Tensor) or scale != 1):
        raise ValueError(f"scale: got {scale} with a context that is not doubled; only scale 1 needs no second half")
    rows, timesteps = table.rows.to(device), table.timesteps.to(device)
    chains = step_chains(guidance, table.steps, chain, light)
    widths = [doubled and not (alone is not None and alone.steps[index]) for index in range(table.steps)]
    kinds = step_kinds(table, chains, widths, whole_steps(reuse_every, widths, plan.mixes))
    targets = plan.targets.to(device)
    # Checked where the plan was made.
    mix = Mix(plan.partners.to(device), plan.boxes.to(device), checked=True) if any(plan.mixes) else None
    draw = Draw(seed, sample_ids.to(device))
    scales = scale if isinstance(scale, Tensor) else torch.full((batch,), scale, dtype=torch.float32, device=device)

    # Latents lie as the UNet takes them, so that no step has to turn them round.
    z = (noise.float() * table.initial_scale).contiguous(memory_format=torch.channels_last)
    lanes = {doubled: open_lane(unet, vjp, context, z.shape[1:], timesteps)}
    if alone is not None:
        lanes[False] = open_lane(alone.unet, alone.vjp, context[-batch:], z.shape[1:], timesteps)
    step = start_counter(device)
    previous_x0 = None
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    frozen = torch.zeros(table.steps, dtype=torch.int32, device=device)
    unguided = torch.full((4,), torch.nan, device=device)
    losses = []
    loop = Loop(lanes, rows, step, scales, draw, mix, frozen, guidance, kernel)
    loop.begin(widths[0], z)

    for index, (kind, (steers, _)) in enumerate(zip(kinds, chains, strict=True)):
        if steers is None or guidance.mode == "clean":
            (z, previous_x0, alive), loss = loop.clean_step(kind, steers, z, previous_x0, alive, targets[index])
            losses.append(unguided if loss is None else loss)
            continue
        lane = lanes[kind.doubled]
        inputs, timestep = lane.input.sample, lane.input.timestep
        with torch.set_grad_enabled(lane.vjp is None):
            leaf = inputs.detach().requires_grad_(lane.vjp is None)
            output = lane.unet(leaf, timestep, lane.context)
        prediction = loop.predict(z, output.detach())
        gradient = steers(prediction.x0, targets[index], alive)
        losses.append(gradient.losses)
        # What guidance scale and prediction type make of it is left to `move`: the product is linear in it.
        cotangent = gradient.gradient.repeat(2, 1, 1, 1) if kind.doubled else gradient.gradient
        if lane.vjp is not None:
            _, by_inputs = lane.vjp(leaf, timestep, lane.context, cotangent)
        else:
            (by_inputs,) = torch.autograd.grad(output, leaf, cotangent.to(output.dtype))
        z, prediction, alive = move(
            z,
            prediction,
            rows,
            step,
            alive,
            loop.steering(gradient),
            dense(by_inputs),
            inputs=inputs if guidance.mode == "exact" else None,
            kernel=kernel,
        )
        if guidance.mode == "exact":
            prediction = loop.predict(z, lane.unet(inputs, timestep, lane.context))
        z, previous_x0, alive = loop.advance(kind, z, prediction, previous_x0, alive, None)

    return Trajectory(z, alive & finite(z), targets[-1], torch.stack(losses), frozen)
