"""The engines of a run: which stages it has, their runners from the cache, and how the sampler calls them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdfkd.engine.backends.build import Backend, Built, Make, Settings, build
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.cheap_steps import light_steps, prompt_alone_steps
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.engine_stages import (
    Batches,
    chain_engine_stage,
    decoder_engine_stage,
    student_weights,
    unet_engine_stage,
    vjp_engine_stage,
)
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.runner import NoEngine, Runner
from diffdfkd.engine.stages import Gradient


@dataclass(frozen=True)
class Subject:
    """What a run's stages are made of."""

    recipe: Recipe
    prior: Prior
    teacher: Classifier
    context: Tensor
    """[n, T, D] prompt embeddings of the run."""
    student: Classifier | None = None
    """Where the round's guidance looks at it."""
    batches: Batches | None = None
    """By default ``synthesis.batch_size`` alone."""

    @property
    def images(self) -> Batches:
        return self.batches or Batches(self.recipe.synthesis.batch_size)

    @property
    def precision(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.recipe.engine.precision or self.recipe.prior.dtype)
        return dtype

    @property
    def doubled(self) -> bool:
        """Whether the UNet runs twice an image, with and without the prompt."""
        return self.prior.guidance_width is None and self.recipe.synthesis.guidance_scale != 1

    def make(self, stage: str) -> Make:
        """The stage of a name in a precision."""
        recipe, prior = self.recipe, self.prior
        rows = self.images.rows(2 if self.doubled else 1)
        scale = recipe.synthesis.guidance_scale
        makers: dict[str, Make] = {
            "unet": lambda dtype: unet_engine_stage(prior, rows, self.context, dtype, scale),
            "vjp": lambda dtype: vjp_engine_stage(prior, rows, self.context, dtype, scale),
            "chain": lambda dtype: chain_engine_stage(
                prior, self.teacher, recipe.guidance, self.images, dtype, self.student
            ),
            "light chain": lambda dtype: chain_engine_stage(
                prior, self.teacher, recipe.guidance, self.images, dtype, self.student, prior.guidance_decoder
            ),
            # In steps without classifier-free guidance.
            "unet alone": lambda dtype: unet_engine_stage(prior, self.images, self.context, dtype, scale),
            "vjp alone": lambda dtype: vjp_engine_stage(prior, self.images, self.context, dtype, scale),
            "decoder": lambda dtype: decoder_engine_stage(prior, self.images, dtype),
        }
        return makers[stage]


def run_settings(recipe: Recipe) -> Settings:
    """What the recipe says of building engines."""
    engine = recipe.engine
    folder = None if engine.cache is None else Path(engine.cache)
    limit = None if engine.memory_mib is None else engine.memory_mib * 2**20
    return Settings(EngineCache(folder), recipe.threads, tuple(engine.capabilities), limit)


def stages_of(recipe: Recipe) -> list[str]:
    """Stages that the recipe's rounds call."""
    guidance, steps = recipe.guidance, recipe.synthesis.steps
    alone = any(prompt_alone_steps(recipe.synthesis))
    stages = ["unet", *(["unet alone"] if alone else [])]
    if guidance.mode in ("exact", "reuse"):
        stages += ["vjp", *(["vjp alone"] if alone else [])]
    guided = list(zip(guided_steps(guidance, steps), light_steps(guidance, steps), strict=True))
    stages += ["chain"] if (True, False) in guided else []
    stages += ["light chain"] if (True, True) in guided else []
    return stages


def backend_of(recipe: Recipe, stage: str) -> str:
    """What the recipe says runs a stage: the UNet's gradients go with the UNet."""
    return getattr(recipe.engine, field_of(stage))  # type: ignore[no-any-return]


def field_of(stage: str) -> str:
    """The field under ``engine`` that says what runs a stage."""
    return "chain" if stage in ("chain", "light chain") else "unet"


def serves_itself(recipe: Recipe, backend: str) -> bool:
    """Whether the stage is the plain one of `engine/stages.py`, which needs no engine."""
    precision = recipe.engine.precision or recipe.prior.dtype
    return backend in ("auto", "eager") and precision == recipe.prior.dtype


def open_engine(subject: Subject, stage: str, backend: str, settings: Settings) -> Built:
    """The runner of an explicit choice; UserError, naming the field and the cure, where it cannot be had."""
    chosen: Backend = "eager" if backend == "auto" else backend  # type: ignore[assignment]
    try:
        return build(subject.make(stage), chosen, subject.precision, settings)
    except NoEngine as reason:
        raise cannot_be_had(stage, chosen, subject.precision, reason) from None


def cannot_be_had(stage: str, backend: str, precision: torch.dtype, reason: NoEngine) -> UserError:
    """The error that names the field of an engine and the cure: of what eager cannot do it is the precision."""
    field = field_of(stage)
    cure = f"; or give engine.{field}=eager"
    if backend == "eager":
        cure = "" if precision == torch.float32 else "; give engine.precision=float32"
    return UserError(f"engine.{field}: {backend} cannot be had: {reason}{cure}")


class EngineUNet:
    """A UNet's runner as the sampler calls it; the sampler writes its next input straight into the runner's buffer."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def claim(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers of the sample and the timestep for the rows of ``context``, and the context where it is read."""
        sample, timestep, held = self.runner.views(len(context))
        held.copy_(context)
        return sample, timestep, held

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        (output,) = self.runner(sample, timestep, context)
        return output


class EngineVjp:
    """The runner of the UNet's vector-Jacobian product as the sampler calls it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        output, by_sample = self.runner(sample, timestep, context, cotangent)
        return output, by_sample


class EngineChain:
    """A guidance chain's runner as the sampler calls it; the student's weights are handed over once."""

    def __init__(self, runner: Runner, student: Classifier | None = None) -> None:
        self.runner = runner
        self.student: tuple[Tensor, ...] = ()
        if student is not None and len(runner.specification.inputs) > 4:
            held = runner.views(1)[4:]
            for buffer, value in zip(held, student_weights(student).values(), strict=True):
                buffer.copy_(value)
            self.student = tuple(held)

    def __call__(self, x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        gradient, norm, finite, losses = self.runner(x0, targets, alive, weights, *self.student)
        # The losses outlive the step; the rest is read before the next call.
        return Gradient(gradient, norm, finite, losses.clone())
