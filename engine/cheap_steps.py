"""Cheap steps: which of a trajectory take the light decoder, the prompt alone, or the features of an earlier step.

Plain arithmetic; nothing heavy is imported here. docs/method.md says what they are worth.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from diffdfkd.engine.windows import window_steps

if TYPE_CHECKING:
    from diffdfkd.engine.recipe import GuidanceRecipe, Recipe, SynthesisRecipe


def uses_light(guidance: "GuidanceRecipe") -> bool:
    """Whether the recipe guides through a light decoder at all."""
    return guidance.mode != "none" and guidance.decoder != "full"


def light_steps(guidance: "GuidanceRecipe", steps: int) -> list[bool]:
    """Per step, whether guidance goes through the light decoder where it is guided."""
    if not uses_light(guidance):
        return [False] * steps
    inside = set(window_steps(guidance.decoder_window, steps))
    return [step in inside for step in range(steps)]


def prompt_alone_steps(synthesis: "SynthesisRecipe") -> list[bool]:
    """Per step, whether classifier-free guidance is switched off in it by its interval."""
    if synthesis.guidance_scale == 1:
        return [False] * synthesis.steps
    inside = set(window_steps(synthesis.guidance_interval, synthesis.steps))
    return [step not in inside for step in range(synthesis.steps)]


def whole_steps(every: int, doubled: Sequence[bool], mixes: Sequence[bool]) -> list[bool]:
    """Per step, whether the whole UNet runs where features are reused for ``every`` steps.

    So it does in the first step, in each ``every``-th after the last time, after a mix (the kept features are of the
    latents as they were before) and where classifier-free guidance sets in (kept are those of the prompt alone).
    """
    whole: list[bool] = []
    age = every
    for step, wide in enumerate(doubled):
        stale = step > 0 and (mixes[step - 1] or (wide and not doubled[step - 1]))
        age = 1 if age >= every or stale else age + 1
        whole.append(age == 1)
    return whole


def impossibly_cheap(recipe: "Recipe", guided: Sequence[bool]) -> Iterable[tuple[str, str]]:
    """What of it does not go together, as (field, what is wrong and the cure); ``guided``: per step."""
    if recipe.guidance.mode != "none":
        yield from _no_light_step(recipe.guidance, guided)
    yield from _cheap_unet(recipe, guided)


def _no_light_step(guidance: "GuidanceRecipe", guided: Sequence[bool]) -> Iterable[tuple[str, str]]:
    """A window without a guided step, and one that is given with the full decoder alone."""
    if guidance.decoder == "full":
        if guidance.decoder_window != (0.0, 1.0):
            yield (
                "guidance.decoder_window",
                f"got {list(guidance.decoder_window)} with guidance.decoder=full, which serves everywhere; name a "
                "light decoder's file, or leave the window out",
            )
        return
    if not any(map(operator.and_, guided, light_steps(guidance, len(guided)))):
        yield (
            "guidance.decoder_window",
            f"{list(guidance.decoder_window)} holds none of the guided steps, so that the light decoder would never "
            "serve; widen it, or set guidance.decoder=full",
        )


def _cheap_unet(recipe: "Recipe", guided: Sequence[bool]) -> Iterable[tuple[str, str]]:
    """Classifier-free guidance in an interval, and features reused across steps."""
    synthesis, guidance, engine = recipe.synthesis, recipe.guidance, recipe.engine
    if synthesis.guidance_interval != (0.0, 1.0):
        inside = set(window_steps(synthesis.guidance_interval, synthesis.steps))
        interval = list(synthesis.guidance_interval)
        if synthesis.guidance_scale == 1:
            yield (
                "synthesis.guidance_interval",
                f"got {interval} with synthesis.guidance_scale=1, which has no classifier-free guidance to switch off; "
                "take another scale, or leave the interval out",
            )
        elif not inside:
            yield (
                "synthesis.guidance_interval",
                f"{interval} holds none of the {synthesis.steps} steps, which begin at multiples of "
                f"{1 / synthesis.steps:.3g}; widen it, or set synthesis.guidance_scale=1",
            )
        outside = [step for step in range(synthesis.steps) if guided[step] and step not in inside]
        if guidance.rho_rule == "cfg" and outside:
            yield (
                "guidance.rho_rule",
                f"cfg needs classifier-free guidance, but {len(outside)} guided step(s) lie outside "
                f"synthesis.guidance_interval={interval}; take unit or raw, or a guidance.window inside it",
            )
    if synthesis.reuse_every > 1:
        field, given = "synthesis.reuse_every", f"got {synthesis.reuse_every}"
        if synthesis.reuse_every > synthesis.steps:
            yield field, f"{given} with synthesis.steps={synthesis.steps}; at most one whole call is needed, give less"
        if guidance.mode in ("exact", "reuse"):
            yield (
                field,
                f"{given} with guidance.mode={guidance.mode}, whose gradient goes through the whole UNet; take "
                "guidance.mode=clean, or reuse_every 1",
            )
        if engine.unet not in ("auto", "eager"):
            yield (
                field,
                f"{given} with engine.unet={engine.unet}, whose graph is the whole UNet; give engine.unet=eager",
            )
        elif engine.precision not in (None, recipe.prior.dtype):
            yield (
                field,
                f"{given} with engine.precision={engine.precision}, which makes an engine of the UNet; leave it out",
            )
