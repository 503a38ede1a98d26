"""The heavy parts of a run as stages for engines: pure tensor functions of one precision, each with its specification.

`engine/stages.py` says what UNet, decoder and guidance chain compute. Here each becomes a function of tensors alone,
without autocast, or hooks that get into a caller's way: what it needs of the networks is copied in the stage's
precision, or is theirs where that is the same. Interfaces stay float32; inside, networks compute in ``precision``,
moments and losses in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.example_student import acting_weights
from diffdfkd.engine.guidance_decoder import GuidanceDecoder
from diffdfkd.engine.plan import lasting, weights_digest
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.runner import NoEngine
from diffdfkd.engine.specification import Port, Specification
from diffdfkd.engine.stage_networks import Answering, Lowered, decoder, in_precision, light_decoder, student_weights
from diffdfkd.engine.stages import (
    chain_specification,
    dense,
    guidance_chain,
    guidance_embedding,
    unet_specification,
)
from diffdfkd.engine.taps import guidance_taps
from diffdfkd.kernels.launch import at_least_float32
from diffdfkd.kernels.philox import EXAMPLES, philox_normal, philox_uniform

SHARES = ((1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 0.5, 2.0))
"""Of the recipe's weights of class, BatchNorm and adversarial loss, in the examples of a chain."""
StageName = Literal["unet", "chain", "vjp", "decoder"]
Function = Callable[..., tuple[Tensor, ...]]


class Batches(NamedTuple):
    """Images that an engine takes at once; None: the usual number alone."""

    usual: int
    least: int | None = None
    most: int | None = None

    def rows(self, copies: int) -> "Batches":
        """The same in rows of a UNet that runs ``copies`` times an image."""
        least, most = (None if bound is None else bound * copies for bound in (self.least, self.most))
        return Batches(self.usual * copies, least, most)


@dataclass(frozen=True)
class Stage:
    """A pure function of tensors that an engine may compute, and all that is known of it."""

    specification: Specification
    precision: torch.dtype
    make: Callable[[torch.dtype], Function]
    """The function in a precision; each may hold a copy of the networks, so it is made when it is wanted, and once."""
    digest: str
    """SHA-256 of weights and settings: all that the function depends on besides its inputs."""
    examples: Callable[[int, int], tuple[Tensor, ...]]
    """Inputs for a number of rows and a seed, as a run has them: parity is measured on them."""
    gradients: tuple[str, ...] = ()
    """Outputs that rounding moves by whole entries where a network has kinks: they are judged by cosine too."""

    @property
    def function(self) -> Function:
        """In the order of the specification; no autograd is needed around it."""
        return self.make(self.precision)

    @property
    def reference(self) -> Function:
        """The same in float32, in eager mode: what engines are compared with."""
        return self.make(torch.float32)

    @property
    def name(self) -> str:
        return self.specification.name

    @property
    def device(self) -> torch.device:
        return self.examples(1, 0)[0].device


def ranged(specification: Specification, batches: Batches) -> Specification:
    """The specification with a range of batches."""
    return Specification(specification.name, specification.inputs, specification.outputs, batches.least, batches.most)


def unet_engine_stage(
    prior: Prior, batches: Batches, context: Tensor, precision: torch.dtype, guidance_scale: float = 1.0
) -> Stage:
    """The UNet: sample [N, c, h, w], timestep [N], context [N, T, D] -> prediction [N, c, h, w].

    ``batches`` are in rows. ``context`` [n, T, D] are prompt embeddings of the run, for the examples.
    """
    specification = ranged(unet_specification(prior.latent_shape, batches.usual, *context.shape[1:]), batches)

    def made(dtype: torch.dtype) -> Function:
        return _unet_function(prior, dtype, guidance_scale)

    def examples(rows: int, seed: int) -> tuple[Tensor, ...]:
        sample, timestep, embedding = _unet_inputs(prior, rows, seed, context)
        return sample, timestep, embedding

    return Stage(
        specification,
        precision,
        functools.cache(made),
        _unet_digest(prior, "unet", precision, guidance_scale),
        examples,
    )


def vjp_engine_stage(
    prior: Prior, batches: Batches, context: Tensor, precision: torch.dtype, guidance_scale: float = 1.0
) -> Stage:
    """The UNet and the product of its Jacobian, transposed, with a cotangent [N, c, h, w], in one forward-only graph.

    (sample, timestep, context, cotangent) -> (prediction, by_sample), by_sample [N, c, h, w] the derivative of
    (prediction, cotangent) with respect to the sample.
    """
    plain = unet_specification(prior.latent_shape, batches.usual, *context.shape[1:])
    latents = plain.inputs[0].shape
    specification = Specification(
        "vjp",
        (*plain.inputs, Port("cotangent", latents, torch.float32)),
        (*plain.outputs, Port("by_sample", latents, torch.float32)),
        batches.least,
        batches.most,
    )

    def made(dtype: torch.dtype) -> Function:
        unet = _unet_function(prior, dtype, guidance_scale)

        def vjp(sample: Tensor, timestep: Tensor, context: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaf = sample.detach().requires_grad_()
                (output,) = unet(leaf, timestep, context)
                (by_sample,) = torch.autograd.grad(output, leaf, cotangent)
            return output.detach(), dense(by_sample)

        return vjp

    def examples(rows: int, seed: int) -> tuple[Tensor, ...]:
        inputs = _unet_inputs(prior, rows, seed, context)
        return *inputs, _noise(prior, rows, seed + 1)

    return Stage(
        specification,
        precision,
        functools.cache(made),
        _unet_digest(prior, "vjp", precision, guidance_scale),
        examples,
        gradients=("by_sample",),
    )


def decoder_engine_stage(prior: Prior, batches: Batches, precision: torch.dtype) -> Stage:
    """The VAE's decoder: latents [B, c, h, w] -> images [B, C, H, W] in [0, 1]."""
    specification = Specification(
        "decoder",
        (Port("latents", (batches.usual, *prior.latent_shape), torch.float32),),
        (Port("images", (batches.usual, prior.channels, *prior.image_size), torch.float32),),
        batches.least,
        batches.most,
    )

    def made(dtype: torch.dtype) -> Function:
        decode = decoder(prior, dtype)
        return lambda latents: (dense(at_least_float32(decode(latents))),)

    return Stage(
        specification,
        precision,
        functools.cache(made),
        weights_digest([prior.vae], "decoder", precision, *_decoder_settings(prior)),
        lambda rows, seed: (_noise(prior, rows, seed),),
    )


def chain_engine_stage(
    prior: Prior,
    teacher: Classifier,
    weights: GuidanceRecipe,
    batches: Batches,
    precision: torch.dtype,
    student: Classifier | None = None,
    light: GuidanceDecoder | None = None,
) -> Stage:
    """The guidance chain: (x0, targets, alive, shares) -> (gradient, norm, finite, losses), its gradient within.

    It goes through the light decoder where one is given, else through the prior's own. Which terms there are
    ``weights`` says; what each weighs is an input, ``shares`` [3]. With a student its weights are inputs as well, by
    the names of `student_weights`: a new snapshot needs no new engine, and its values enter no digest. Raises NoEngine
    for a chain in micro-batches.
    """
    if weights.micro_batch is not None:
        raise NoEngine("chain: guidance.micro_batch splits the batch, which one engine does not", lasting=True)
    settings = _decoder_settings(prior) if light is None else (light.settings(),)

    def decode(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return decoder(prior, dtype) if light is None else light_decoder(light, dtype)

    classes = len(teacher.classes)
    plain = chain_specification(prior.latent_shape, batches.usual, classes)
    given = student_weights(student) if student is not None and weights.adversarial_weight > 0 else {}
    ports = tuple(
        Port(f"student_{index}", tuple(value.shape), torch.float32, batched=False)
        for index, value in enumerate(given.values())
    )
    specification = Specification("chain", (*plain.inputs, *ports), plain.outputs, batches.least, batches.most)
    # What is a constant of the graph; of a term that is left out nothing.
    listening = weights.batchnorm_weight > 0
    terms = [weights.layers, weights.layer_weights, weights.statistics] if listening else None

    def made(dtype: torch.dtype) -> Function:
        pupil = Answering(student, dtype, list(given)) if given and student is not None else None
        master = Lowered(teacher, dtype)
        # The hooks stay for as long as the copy that they sit on.
        taps = guidance_taps(master.model, weights, teacher.model) if listening else None
        chain = guidance_chain(decode(dtype), master, taps, weights, pupil, kernel="reference")

        def function(x0: Tensor, targets: Tensor, alive: Tensor, shares: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            if pupil is not None:
                pupil.given = dict(zip(given, values, strict=True))
            return tuple(chain(x0, targets, alive, shares))

        return function

    def examples(rows: int, seed: int) -> tuple[Tensor, ...]:
        x0 = _noise(prior, rows, seed)
        labels = torch.arange(seed, seed + rows, device=x0.device) % classes
        targets = torch.nn.functional.one_hot(labels, classes).float()
        # Soft labels, and samples that have dropped out, belong to a run.
        targets[1::3] = 0.7 * targets[1::3] + 0.3 * targets.roll(1, 0)[1::3]
        alive = torch.ones(rows, dtype=torch.bool, device=x0.device)
        alive[4::7] = False
        # The recipe's weights, and others: they may change from step to step, and from run to run.
        shares = torch.tensor(
            [weights.class_weight or 1.0, weights.batchnorm_weight, weights.adversarial_weight], device=x0.device
        )
        return x0, targets, alive, shares * torch.tensor(SHARES[seed % len(SHARES)], device=x0.device), *shown()

    @functools.cache
    def shown() -> tuple[Tensor, ...]:
        """A student's weights that its term acts with; its own may be a fresh one's, whose term is 0 everywhere."""
        if not given or student is None:
            return ()
        return acting_weights(student, teacher, decode(torch.float32), _noise(prior, batches.usual, 0))

    return Stage(
        specification,
        precision,
        functools.cache(made),
        weights_digest(
            [light or prior.vae, teacher],
            *("chain", precision, *settings, teacher.model, teacher.preprocessing, terms),
            # Of the student its architecture alone: the names and shapes of what it is given.
            [(name, list(value.shape)) for name, value in given.items()],
            repr(student.model) if given and student is not None else None,
        ),
        examples,
        gradients=("gradient", "norm"),
    )


def _unet_function(prior: Prior, dtype: torch.dtype, guidance_scale: float) -> Function:
    unet: Any = in_precision(prior.unet, dtype)
    told = None
    if prior.guidance_width is not None:
        told = guidance_embedding(guidance_scale, prior.guidance_width).to(_device(prior.unet), dtype)

    def function(sample: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        sample = sample.to(dtype).contiguous(memory_format=torch.channels_last)
        condition = None if told is None else told.expand(len(sample), -1)
        output = unet(
            sample, timestep, encoder_hidden_states=context.to(dtype), timestep_cond=condition, return_dict=False
        )[0]
        return (dense(at_least_float32(output)),)

    return function


def _unet_digest(prior: Prior, name: StageName, precision: torch.dtype, guidance_scale: float) -> str:
    unet: Any = prior.unet
    return weights_digest(
        [unet], name, precision, guidance_scale if prior.guidance_width is not None else None, lasting(unet.config)
    )


def _decoder_settings(prior: Prior) -> tuple[Any, ...]:
    vae: Any = prior.vae
    return prior.scaling_factor, prior.shift_factor, lasting(vae.config)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _noise(prior: Prior, rows: int, seed: int) -> Tensor:
    ids = torch.arange(rows, device=_device(prior.unet))
    return philox_normal(seed, ids, 0, EXAMPLES, prior.latent_shape)


def _unet_inputs(prior: Prior, rows: int, seed: int, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps spread over all of the schedule, and prompts in turn."""
    last = prior.scheduler_config.get("num_train_timesteps", 1000) - 1
    ids = torch.arange(rows, device=context.device)
    timestep = (philox_uniform(seed, ids, 1, EXAMPLES, 1)[:, 0] * last).round()
    return _noise(prior, rows, seed), timestep.float(), context[(ids + seed) % len(context)].float()
