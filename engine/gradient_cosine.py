"""How far a light decoder's guidance gradient points where the full decoder's does: cosines, by noise level."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.cheap_steps import light_steps
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.memory import fitting
from diffdfkd.engine.micro_batches import micro_batched_chain
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.prior_samples import OUTSIDE, predicted_latents, sample_classes
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.stages import Gradient, decode_stage, light_decode_stage
from diffdfkd.engine.taps import guidance_taps
from diffdfkd.engine.windows import term_weights

LEVELS = ("early", "middle", "late")
"""Thirds of the trajectory, from pure noise on."""
FRESH = OUTSIDE + 2**40
"""First sample id of those that no decoder was distilled on."""


LOW_COSINE = 0.7
"""Below it a light decoder is pointed out. On the demo a linear map, of the kind that cost students on digits, has 0.55
to 0.63, and convolutions that were trained for a minute or more have 0.73 and above (docs/method.md)."""
CHECKED = 32
"""Samples of the check before a run, at most a batch."""
AT_ONCE = 8
"""Of those that networks see together, unless ``guidance.micro_batch`` says less: L_bn is that of all of them, exactly,
and a light decoder may serve batches for which the full one has no memory."""

log = logging.getLogger(__name__)


class Agreement(NamedTuple):
    """Of a light decoder with the full one at one noise level."""

    level: str
    cosine: float
    """Mean over samples and steps of the gradients' cosine; NaN where none could be compared."""
    pixels: float
    """Mean absolute difference of the images, of [0, 1], at the light decoder's size."""


def cosines(ours: Gradient, theirs: Gradient) -> Tensor:
    """[n] float32 of the samples where both gradients are finite and theirs is not 0: 1 where they point the same way.

    0 where ours is 0 and so points nowhere.
    """
    counts = ours.finite & theirs.finite & (theirs.norm > 0)
    a, b = ours.gradient[counts].flatten(1).double(), theirs.gradient[counts].flatten(1).double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths, 0).float()


def compare_decoders(
    recipe: Recipe, prior: Prior, teacher: Classifier, *, samples: int, steps: Sequence[int] | None = None
) -> list[Agreement]:
    """Of ``prior.guidance_decoder`` on ``samples`` fresh unguided ones, as one batch at each step of the trajectory.

    Gradients are those of the whole chain with the terms that act at the step in the first round, in eager mode.
    ``steps``: those that are looked at; all by default. Steps at which the student's term alone acts are left out, and
    so are levels without another one.
    """
    light = prior.guidance_decoder
    if light is None:
        raise ValueError("the prior has no guidance decoder to compare")
    ids = torch.arange(FRESH, FRESH + samples)
    latents = predicted_latents(recipe, prior, ids)
    dtype = getattr(torch, recipe.prior.dtype)
    decoders = {"full": decode_stage(prior, dtype), "light": light_decode_stage(light, dtype)}
    classes = sample_classes(ids, len(recipe.teacher.classes)).to(latents.device)
    targets = torch.nn.functional.one_hot(classes, len(recipe.teacher.classes)).float()
    alive = torch.ones(samples, dtype=torch.bool, device=latents.device)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {level: [] for level in LEVELS}
    guidance = recipe.guidance
    size = min(guidance.micro_batch or AT_ONCE, samples)
    taps = guidance_taps(teacher.model, guidance) if guidance.batchnorm_weight > 0 else None
    try:
        chains = {
            name: micro_batched_chain(decode, teacher, taps, guidance, size=size, kernel="reference")
            for name, decode in decoders.items()
        }
        for step in range(len(latents)) if steps is None else steps:
            weights = term_weights(guidance, len(latents))[step]
            if not any(weights[:2]):
                continue
            given = (latents[step], targets, alive, torch.tensor(weights, device=latents.device))
            ours, theirs = (chains[name](*given) for name in ("light", "full"))
            with torch.no_grad():
                error = torch.cat([pixel_error(decoders, part) for part in latents[step].split(size)])
            found[level_of(step, len(latents))].append((cosines(ours, theirs), error))
    finally:
        if taps is not None:
            taps.remove()
    return [
        Agreement(level, _mean([cosine for cosine, _ in pairs]), _mean([error for _, error in pairs]))
        for level, pairs in found.items()
        if pairs
    ]


def pixel_error(decoders: Mapping[str, Callable[[Tensor], Tensor]], latents: Tensor) -> Tensor:
    """[n] mean absolute difference of the ``light`` and the ``full`` decoder's images of latents [n, c, h, w]."""
    image = decoders["light"](latents)
    return (image - reduced(decoders["full"](latents), image.shape[-1])).abs().mean((1, 2, 3))


def check_decoder(recipe: Recipe, prior: Prior, teacher: Classifier, journal: Journal) -> None:
    """Compare the light decoder's gradient with the full one's where it is to guide, before any image is made.

    The cosines go into the journal; a low one is pointed out. Raises UserError for one that is not above 0.
    """
    guidance, steps = recipe.guidance, recipe.synthesis.steps
    served = [
        step
        for step, both in enumerate(zip(guided_steps(guidance, steps), light_steps(guidance, steps), strict=True))
        if all(both)
    ]
    by_level = [[step for step in served if level_of(step, steps) == level] for level in LEVELS]
    looked_at = [among[len(among) // 2] for among in by_level if among]
    samples = min(CHECKED, recipe.synthesis.batch_size)
    with fitting("guidance.decoder", "comparing its gradient with the full decoder's", "give a smaller prior.dtype"):
        found = compare_decoders(recipe, prior, teacher, samples=samples, steps=looked_at)
    if not found:
        return
    journal.log("guidance_decoder", samples=samples, cosines={level: round(value, 4) for level, value, _ in found})
    words = ", ".join(f"{level} {cosine:.2f}" for level, cosine, _ in found)
    if not all(cosine > 0 for _, cosine, _ in found):
        raise UserError(
            f"guidance.decoder: {guidance.decoder} leads elsewhere than the full decoder: its gradient's cosine is "
            f"{words}; distil another one (diffdfkd decoder, more steps or width), or give 'full'"
        )
    if min(cosine for _, cosine, _ in found) < LOW_COSINE:
        log.warning(
            "guidance.decoder: the cosine of its gradient with the full decoder's is %s, below %g: students may "
            "suffer; a wider decoder, more steps of its training or a narrower guidance.decoder_window help",
            words,
            LOW_COSINE,
        )


def level_of(step: int, steps: int) -> str:
    """The third of the trajectory that a step lies in."""
    return LEVELS[len(LEVELS) * step // steps]


def reduced(images: Tensor, width: int) -> Tensor:
    """Images [B, C, H, W] as means over squares, so that they are ``width`` wide; W a multiple of it."""
    factor = images.shape[-1] // width
    return images if factor == 1 else torch.nn.functional.avg_pool2d(images, factor)


def _mean(parts: list[Tensor]) -> float:
    values = torch.cat(parts)
    return values.mean().item() if len(values) else math.nan
