"""The guided denoising loop over stages; it knows nothing of files, ranks or models.

A guided step is UNet -> predict -> guidance chain -> advance in mode ``clean``. Modes ``exact`` (as published:
DiffDFKD, arXiv 2504.00870) and ``reuse`` take the gradient through the UNet as well and move z in the place of x0.
Nothing in the loop waits for the device: what Python branches on is decided before it, and which step it is the device
counts by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdfkd.engine.cheap_steps import whole_steps
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.fan_out import branched
from diffdfkd.engine.guidance_schedule import GuidanceSchedule
from diffdfkd.engine.loop import Alone, Loop, open_lanes, step_chains, step_kinds, step_widths
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.schedule import Table
from diffdfkd.engine.seams import blend, repair_seams
from diffdfkd.engine.stages import Chain, UNet, Vjp, dense, finite
from diffdfkd.kernels.advance import Advance
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.move import move
from diffdfkd.kernels.row import start_counter
from diffdfkd.kernels.step_inputs import Draw, Mix


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
            for lane in loop.lanes.values():
                blend(lane.context, shares, prompts)
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
    widths = step_widths(doubled, alone, table.steps)
    kinds = step_kinds(table, chains, widths, whole_steps(reuse_every, widths, changes(plan)))
    plan, prompts, sample_ids = plan.to(device), context[-batch:], sample_ids.to(device)
    scales = scale if isinstance(scale, Tensor) else torch.full((batch,), scale, dtype=torch.float32, device=device)

    # Latents lie as the UNet takes them, so that no step has to turn them round.
    z = (noise.float() * table.initial_scale).contiguous(memory_format=torch.channels_last)
    # What is blended is written where the UNet reads it, which is the caller's no longer.
    context = context.clone() if plan.blends else context
    lanes = open_lanes(unet, vjp, alone, context, batch, z.shape[1:], timesteps)
    step = start_counter(device)
    frozen = torch.zeros(table.steps, dtype=torch.int32, device=device)
    schedule = GuidanceSchedule.of(guidance, [kind.guided for kind in kinds], device)

    def enter(plan: CutMixPlan, ids: Tensor) -> Loop:
        # Checked where the plan was made.
        mix = Mix(plan.partners, plan.boxes, checked=True) if any(plan.mixes) else None
        return Loop(lanes, widths, rows, step, scales, Draw(seed, ids), mix, frozen, guidance, schedule, kernel)

    def one(index: int, loop: Loop, state: Advance, target: Tensor) -> tuple[Advance, Tensor | None]:
        z, previous_x0, alive = state
        kind, (steers, _) = kinds[index], chains[index]
        if steers is None or guidance.mode == "clean":
            return loop.clean_step(kind, steers, z, previous_x0, alive, target)
        lane = lanes[kind.doubled]
        inputs, timestep = lane.input.sample, lane.input.timestep
        with torch.set_grad_enabled(lane.vjp is None):
            leaf = inputs.detach().requires_grad_(lane.vjp is None)
            output = lane.unet(leaf, timestep, lane.context)
        prediction = loop.predict(z, output.detach())
        gradient = loop.ask(steers, prediction, target, alive)
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
            loop.steering(gradient, schedule.factors[index]),
            dense(by_inputs),
            inputs=inputs if guidance.mode == "exact" else None,
            kernel=kernel,
        )
        if guidance.mode == "exact":
            prediction = loop.predict(z, lane.unet(inputs, timestep, lane.context))
        return loop.advance(kind, z, prediction, previous_x0, alive, None), gradient.losses

    start = Advance(z, None, torch.ones(batch, dtype=torch.bool, device=device))
    enter(plan, sample_ids).place(z, 0)
    return travel(enter, one, start, plan, sample_ids, prompts, table.steps)


def changes(plan: CutMixPlan) -> list[bool]:
    """Per step, whether latents are changed after it by more than the step, in the trunk or in a tail."""
    plans = [plan, *(tail.plan for tail in plan.tails)]
    forks = {tail.branch.step - 1 for tail in plan.tails}
    return [any(own.mixes[step] for own in plans) or step in forks for step in range(len(plan.mixes))]
