"""Stages that export in a second or two, for tests of what is made of a stage; and the tiny prior's own stages."""

import functools
from collections.abc import Callable
from pathlib import Path

import small_stage
import torch
from torch import Tensor

from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.engine_stages import (
    Batches,
    Function,
    Stage,
    chain_engine_stage,
    decoder_engine_stage,
    unet_engine_stage,
    vjp_engine_stage,
)
from diffdfkd.engine.prior import Prior, load_prior
from diffdfkd.engine.recipe import GuidanceRecipe, PriorRecipe
from diffdfkd.engine.specification import Port, Specification
from diffdfkd.engine.taps import tappable

CLASSES = ["coat", "bag", "shoe"]
WEIGHTS = GuidanceRecipe(class_weight=1.0, batchnorm_weight=0.3)


def stand_in(
    precision: torch.dtype = torch.float32,
    *,
    rows: int = small_stage.ROWS,
    least: int | None = None,
    most: int | None = None,
    digest: str = "0" * 64,
    factor: float = 1.0,
    spoil: Callable[[Tensor], Tensor] = lambda made: made,
) -> Stage:
    """`SmallStage`, times a factor, with float32 ports.

    ``spoil`` changes what the stage gives in its own precision, and in float32 only if that is it.
    """

    def made(dtype: torch.dtype) -> Function:
        network = small_stage.SmallStage(dtype).requires_grad_(False)
        last = spoil if dtype == precision else (lambda made: made)
        return lambda latent, time: (last(factor * network(latent.to(dtype), time.to(dtype)).float()),)

    specification = small_stage.specify(least=least, most=most, rows=rows)

    def examples(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        return small_stage.examples(rows, seed=seed)

    return Stage(specification, precision, functools.cache(made), digest, examples)


def gradient_stand_in(precision: torch.dtype = torch.float32, rows: int = 4) -> Stage:
    """`SmallStage`, and its vector-Jacobian product by the latent: a stage with a gradient and an unbatched output."""
    plain = small_stage.specify(rows=rows)
    latents = plain.inputs[0].shape

    def made(dtype: torch.dtype) -> Function:
        network = small_stage.SmallStage(dtype).requires_grad_(False)

        def function(latent: Tensor, time: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaf = latent.detach().requires_grad_()
                output = network(leaf.to(dtype), time.to(dtype)).float()
                (gradient,) = torch.autograd.grad(output, leaf, cotangent)
            # Rows of zeros, with which a batch is padded, add nothing.
            return gradient, latent.square().sum((0, 2, 3))

        return function

    def examples(rows: int, seed: int) -> tuple[Tensor, ...]:
        return *small_stage.examples(rows, seed=seed), small_stage.examples(rows, seed=seed + 100)[0]

    specification = Specification(
        "chain",
        (*plain.inputs, Port("cotangent", latents, torch.float32)),
        (Port("gradient", latents, torch.float32), Port("power", (4,), torch.float32, batched=False)),
    )
    return Stage(specification, precision, functools.cache(made), "1" * 64, examples, gradients=("gradient",))


def classifier(channels: int = 1, *, width: int = 4, size: int = 28, seed: int = 1) -> Classifier:
    """A frozen network whose BatchNorm layers remember something; the prior's images are resized for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES["small_cnn"](channels=channels, classes=len(CLASSES), width=width)
        for layer in tappable(model).values():
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
        # As sure of itself as one that was trained.
        torch.nn.init.normal_(model.head.weight, 0, 10)
    preprocessing = Preprocessing(channels, size, (0.4,), (0.3,), "bilinear")
    return Classifier(model, preprocessing, CLASSES).eval().requires_grad_(False)


def open_prior(folder: Path, dtype: str = "float32") -> Prior:
    return load_prior(PriorRecipe.model_validate({"path": str(folder), "dtype": dtype}), "cpu")


def prior_stage(
    name: str,
    prior: Prior,
    batches: Batches,
    precision: torch.dtype = torch.float32,
    *,
    teacher: Classifier | None = None,
    student: Classifier | None = None,
    weights: GuidanceRecipe = WEIGHTS,
) -> Stage:
    """A stage of the prior's by its name, with three prompts as its examples."""
    context = prior.embed([*CLASSES[:2], ""])
    if name == "unet":
        return unet_engine_stage(prior, batches, context, precision)
    if name == "vjp":
        return vjp_engine_stage(prior, batches, context, precision)
    if name == "decoder":
        return decoder_engine_stage(prior, batches, precision)
    return chain_engine_stage(prior, teacher or classifier(prior.channels), weights, batches, precision, student)
