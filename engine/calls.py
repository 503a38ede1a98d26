"""How often the UNet is called in a trajectory: arithmetic over the recipe, for plans and for measures of cost."""

from collections.abc import Sequence

from diffdfkd.engine.cheap_steps import prompt_alone_steps
from diffdfkd.engine.combinations import fork_step, step_runs
from diffdfkd.engine.recipe import Recipe


def rows_by_step(recipe: Recipe, *, doubled: bool = True) -> list[int]:
    """Rows of the UNet for an image in each step: 2 with classifier-free guidance, if the prior makes two of it."""
    twice = doubled and recipe.synthesis.guidance_scale != 1
    return [2 if twice and not alone else 1 for alone in prompt_alone_steps(recipe.synthesis)]


def mending_rows(recipe: Recipe, rows: Sequence[int]) -> int:
    """Most rows that mend the seams of a trajectory and its children; ``rows`` are an image's in each step."""
    from diffdfkd.engine.cutmix import mixed_steps

    synthesis, cutmix = recipe.synthesis, recipe.cutmix
    if cutmix.repair != "masked":
        return 0
    runs = step_runs(synthesis)
    mixes = sum(runs[step] * rows[step] for step in mixed_steps(cutmix, synthesis.steps))
    return cutmix.passes * (mixes + (synthesis.fan_out - 1) * rows[fork_step(synthesis) - 1])
