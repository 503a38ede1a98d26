"""What the steps of a trajectory are and share: kinds of steps, the UNet's lanes, and the step of mode ``clean``.

Between the stages of a clean step lie two launches, `predict` and `advance`, and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.cheap_steps import light_steps
from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.feature_reuse import shallow_form
from diffdfkd.engine.guidance_schedule import GuidanceSchedule
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.schedule import Table
from diffdfkd.engine.stages import BufferedUNet, Chain, Gradient, UNet, Vjp
from diffdfkd.kernels.advance import Advance, advance
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.predict import Prediction, predict
from diffdfkd.kernels.row import named
from diffdfkd.kernels.step_inputs import Draw, Guidance, Mix, NextInput, write_input


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


def open_lanes(
    unet: UNet,
    vjp: Vjp | None,
    alone: Alone | None,
    context: Tensor,
    batch: int,
    latent: Sequence[int],
    timesteps: Tensor,
) -> dict[bool, Lane]:
    """Lanes by whether their rows are doubled: that of ``context`` [B or 2B, T, D], and that of the prompt alone."""
    lanes = {len(context) == 2 * batch: open_lane(unet, vjp, context, latent, timesteps)}
    if alone is not None:
        # Of both halves the prompt's is the last.
        lanes[False] = open_lane(alone.unet, alone.vjp, context[-batch:], latent, timesteps)
    return lanes


def step_widths(doubled: bool, alone: Alone | None, steps: int) -> list[bool]:
    """Per step, whether the UNet's rows are doubled."""
    return [doubled and not (alone is not None and alone.steps[step]) for step in range(steps)]


@dataclass(frozen=True)
class Loop:
    """What all steps of a trajectory share, and the step of mode ``clean`` and of no guidance."""

    lanes: Mapping[bool, Lane]
    """By whether the rows are doubled."""
    widths: Sequence[bool]
    """Per step, whether they are."""
    rows: Tensor
    step: Tensor
    scales: Tensor
    draw: Draw
    mix: Mix | None
    frozen: Tensor
    guidance: GuidanceRecipe
    schedule: GuidanceSchedule
    kernel: Kernel

    def place(self, z: Tensor, index: int) -> Lane:
        """Give the UNet latents z as its input of step ``index``; the lane that this step takes."""
        lane = self.lanes[self.widths[index]]
        write_input(lane.input.sample, named(self.rows[index]).input_scale * z)
        lane.input.timestep.copy_(lane.input.timesteps[index].expand_as(lane.input.timestep))
        return lane

    def predict(self, z: Tensor, output: Tensor, step: Tensor | None = None) -> Prediction:
        """By the row of the trajectory's own counter, or of another."""
        return predict(z, output, self.rows, self.step if step is None else step, self.scales, kernel=self.kernel)

    def ask(self, chain: Chain, prediction: Prediction, target: Tensor, alive: Tensor) -> Gradient:
        return chain(prediction.x0, target, alive, self.schedule.weights_at(self.step))

    def steering(self, found: Gradient, factor: float = 1.0) -> Guidance:
        """How the gradient is followed, with ``factor`` times the recipe's rho."""
        guidance = self.guidance
        return Guidance(found.gradient, found.norm, found.finite, self.scales, guidance.rho_rule, factor * guidance.rho)

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
        found = self.ask(chain, prediction, target, alive)
        # The device knows which step it is, and what rho is there; Python knows it not in a recorded step.
        steering = self.steering(found._replace(gradient=self.schedule.followed(found.gradient, self.step)))
        return self.advance(kind, z, prediction, previous_x0, alive, steering), found.losses


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
