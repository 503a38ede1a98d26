"""The guided denoising loop over stages; it knows nothing of files, ranks or models.

A guided step is UNet -> predict -> guidance chain -> advance in mode ``clean``. Modes ``exact`` (as published:
DiffDFKD, arXiv 2504.00870) and ``reuse`` take the gradient through the UNet as well and move z in the place of x0.
Nothing in the loop waits for the device: what Python branches on is decided before it, and which step it is the device
counts by itself. Between the stages of a clean step lie two launches, `predict` and `advance`, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.fan_out import branched
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.schedule import Table
from diffdfkd.engine.seams import blend, repair_seams
from diffdfkd.engine.stages import BufferedUNet, Chain, Gradient, UNet, Vjp, dense, finite
from diffdfkd.kernels.advance import Advance, advance
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.move import move
from diffdfkd.kernels.predict import Prediction, predict
from diffdfkd.kernels.row import named, row_at, start_counter
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput, write_input


@dataclass(frozen=True)
class Trajectory:
    """Where a batch of B samples ended after S steps; with fan-out their m B children, tail by tail."""

    latents: Tensor
    """[B, c, h, w] float32, clean."""
    alive: Tensor
    """[B] bool; false for samples that became non-finite, or took a patch from one: to be dropped."""
    targets: Tensor
    """[B, K] float32, soft labels after all mixes."""
    losses: Tensor
    """[S, 4], total, class, BatchNorm and adversarial loss per step; NaN where a step was not guided."""
    frozen: Tensor
    """[S] int32, samples that stopped being alive in each step, counted on the device; of all tails together."""


class Kind(NamedTuple):
    """What Python branches on in a step: steps of one kind are the same launches on the same tensors."""

    guided: bool
    draws: bool
    last: bool
    keep_x0: bool


@dataclass(frozen=True)
class Loop:
    """What all steps of a trajectory share, and the step of mode ``clean`` and of no guidance."""

    unet: UNet
    context: Tensor
    rows: Tensor
    step: Tensor
    scales: Tensor
    next_input: NextInput
    draw: Draw
    mix: Mix | None
    frozen: Tensor
    guidance: GuidanceRecipe
    kernel: Kernel

    def predict(self, z: Tensor, output: Tensor, step: Tensor | None = None) -> Prediction:
        """By the row of the trajectory's own counter, or of another."""
        return predict(z, output, self.rows, self.step if step is None else step, self.scales, kernel=self.kernel)

    def place(self, z: Tensor, index: int) -> None:
        """Give the UNet latents z as its input of step ``index``."""
        write_input(self.next_input.sample, named(self.rows[index]).input_scale * z)
        timestep = self.next_input.timestep
        timestep.copy_(self.next_input.timesteps[index].expand(len(timestep)))

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
            next_input=None if kind.last else self.next_input,
            keep_x0=kind.keep_x0,
            frozen=self.frozen,
            kernel=self.kernel,
        )

    def clean_step(
        self, kind: Kind, chain: Chain | None, z: Tensor, previous_x0: Tensor | None, alive: Tensor, target: Tensor
    ) -> tuple[Advance, Tensor | None]:
        """(latents, x0 kept for the next step, who is alive), and the losses of a guided step."""
        output = self.unet(self.next_input.sample, self.next_input.timestep, self.context)
        prediction = self.predict(z, output)
        if chain is None:
            return self.advance(kind, z, prediction, previous_x0, alive, None), None
        gradient = chain(prediction.x0, target, alive)
        return self.advance(kind, z, prediction, previous_x0, alive, self.steering(gradient)), gradient.losses


Enter = Callable[[CutMixPlan, Tensor], Loop]
"""The loop of a plan, and of the ids [B] int64 that its noise is drawn by."""
Step = Callable[[int, Loop, Advance, Tensor], tuple[Advance, Tensor | None]]
"""What a step makes of a state, given its index and targets [B, K]; and the losses [4] where it was guided."""


def travel(
    enter: Enter, step: Step, state: Advance, plan: CutMixPlan, sample_ids: Tensor, prompts: Tensor, steps: int
) -> Trajectory:
    """Through all steps from a state whose input is in place; with fan-out through the trunk, then through each tail.

    ``prompts`` [B, T, D] are the samples' own embeddings.
    """
    unguided = torch.full((4,), torch.nan, device=state.z.device)
    loop = enter(plan, sample_ids)

    def mend(state: Advance, index: int, boxes: Tensor, plan: CutMixPlan) -> Advance:
        """What follows a mix after step ``index``."""
        if (shares := plan.shares.get(index + 1)) is not None:
            blend(loop.context, shares, prompts)
        if plan.repair is None:
            return state
        return state._replace(z=repair_seams(loop, state.z, state.alive, index, boxes, plan.repair))

    def walk(state: Advance, plan: CutMixPlan, indices: range) -> tuple[Advance, list[Tensor]]:
        losses = []
        for index in indices:
            state, loss = step(index, loop, state, plan.targets[index])
            losses.append(unguided if loss is None else loss)
            if plan.mixes[index]:
                state = mend(state, index, plan.boxes[index], plan)
        return state, losses

    if not plan.tails:
        state, losses = walk(state, plan, range(steps))
        return Trajectory(state.z, state.alive & finite(state.z), plan.targets[-1], torch.stack(losses), loop.frozen)
    fork = plan.tails[0].branch.step
    state, shared = walk(state, plan, range(fork))
    # Recorded steps go on in the same tensors.
    trunk = Advance(state.z.clone(), None if state.x0 is None else state.x0.clone(), state.alive.clone())
    state, losses = walk(state, plan, range(fork, steps))
    ends, lost = [Advance(state.z.clone(), None, state.alive & finite(state.z))], [torch.stack(losses)]
    for branch, own in plan.tails:
        loop = enter(own, branch.ids)
        loop.step.fill_(fork)
        state = branched(trunk, branch)
        loop.frozen[fork - 1] += (trunk.alive & ~state.alive).sum()
        loop.place(state.z, fork)
        state = mend(state, fork - 1, branch.boxes, own)
        state, losses = walk(state, own, range(fork, steps))
        ends.append(Advance(state.z.clone(), None, state.alive & finite(state.z)))
        lost.append(torch.stack(losses))
    return Trajectory(
        torch.cat([end.z for end in ends]),
        torch.cat([end.alive for end in ends]),
        torch.cat([plan.targets[-1], *(tail.plan.targets[-1] for tail in plan.tails)]),
        torch.cat([torch.stack(shared), torch.stack(lost).mean(0)]),
        loop.frozen,
    )


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
    kernel: Kernel = "auto",
    vjp: Vjp | None = None,
) -> Trajectory:
    """Latents from unit noise [B, c, h, w] by the table's sampler, steered by ``chain`` as ``guidance`` says.

    ``context`` [2B, T, D], unconditional half first, with guidance scale ``scale`` (a number or [B]); or [B, T, D] with
    scale 1. ``sample_ids`` int64 [B] and ``seed`` draw the noise of stochastic samplers. Without a chain nothing is
    guided. Modes ``exact`` and ``reuse`` need ``vjp``, or a UNet stage that autograd can cross. ``plan`` is
    `plan_cutmix`'s, for the table's steps. ``kernel`` is the form of the operations between the stages:
    kernels/launch.py. Raises ValueError for a context or scale that does not fit.
    """
    batch, device = len(noise), noise.device
    doubled = len(context) == 2 * batch
    if len(context) not in (batch, 2 * batch):
        raise ValueError(f"context: got {len(context)} rows for {batch} latents; B or 2B of them")
    if not doubled and (isinstance(scale, Tensor) or scale != 1):
        raise ValueError(f"scale: got {scale} with a context that is not doubled; only scale 1 needs no second half")
    rows, timesteps = table.rows.to(device), table.timesteps.to(device)
    guided = guided_steps(guidance, table.steps) if chain is not None else [False] * table.steps
    plan, prompts = plan.to(device), context[-batch:]
    scales = scale if isinstance(scale, Tensor) else torch.full((batch,), scale, dtype=torch.float32, device=device)

    # Latents lie as the UNet takes them, so that no step has to turn them round.
    z = (noise.float() * table.initial_scale).contiguous(memory_format=torch.channels_last)
    if isinstance(unet, BufferedUNet):
        inputs, timestep, context = unet.claim(context)
        timestep.copy_(timesteps[0].expand(len(context)))
    else:
        context = context.clone() if plan.blends else context
        inputs = torch.empty((len(context), *z.shape[1:]), device=device, memory_format=torch.channels_last)
        timestep = timesteps[0].repeat(len(context))
    next_input = NextInput(inputs, timestep, timesteps)
    step = start_counter(device)
    write_input(inputs, row_at(rows, step[:1]).input_scale * z)
    frozen = torch.zeros(table.steps, dtype=torch.int32, device=device)

    def enter(plan: CutMixPlan, ids: Tensor) -> Loop:
        # Checked where the plan was made.
        mix = Mix(plan.partners, plan.boxes, checked=True) if any(plan.mixes) else None
        draw = Draw(seed, ids)
        return Loop(unet, context, rows, step, scales, next_input, draw, mix, frozen, guidance, kernel)

    def one(index: int, loop: Loop, state: Advance, target: Tensor) -> tuple[Advance, Tensor | None]:
        z, previous_x0, alive = state
        last = index + 1 == table.steps
        steers = chain if guided[index] else None
        kind = Kind(steers is not None, table.draws[index], last, not last and table.looks_back[index + 1])
        if steers is None or guidance.mode == "clean":
            return loop.clean_step(kind, steers, z, previous_x0, alive, target)
        with torch.set_grad_enabled(vjp is None):
            leaf = inputs.detach().requires_grad_(vjp is None)
            output = unet(leaf, next_input.timestep, context)
        prediction = loop.predict(z, output.detach())
        gradient = steers(prediction.x0, target, alive)
        # What guidance scale and prediction type make of it is left to `move`: the product is linear in it.
        cotangent = gradient.gradient.repeat(2, 1, 1, 1) if doubled else gradient.gradient
        if vjp is not None:
            _, by_inputs = vjp(leaf, next_input.timestep, context, cotangent)
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
            prediction = loop.predict(z, unet(inputs, next_input.timestep, context))
        return loop.advance(kind, z, prediction, previous_x0, alive, None), gradient.losses

    start = Advance(z, None, torch.ones(batch, dtype=torch.bool, device=device))
    return travel(enter, one, start, plan, sample_ids.to(device), prompts, table.steps)
