"""How often the UNet is called in a trajectory: arithmetic over the recipe, for plans and for measures of cost."""

from collections.abc import Sequence

from diffdfkd.engine.cheap_steps import prompt_alone_steps
from diffdfkd.engine.combinations import fork_step, step_runs
from diffdfkd.engine.recipe import Recipe


def rows_by_step(recipe: Recipe, *, doubled: bool = True) -> list[int]:
    """Rows of the UNet for an image in each step: 2 with classifier-free guidance, if the prior makes two of it."""
    return [2 if doubled and not alone else 1 for alone in _alone(recipe)]


def _alone(recipe: Recipe) -> list[bool]:
    synthesis = recipe.synthesis
    return [True] * synthesis.steps if synthesis.guidance_scale == 1 else prompt_alone_steps(synthesis)


def mending_rows(recipe: Recipe, rows: Sequence[int]) -> int:
    """Most rows that mend the seams of a trajectory and its children; ``rows`` are an image's in each step."""
    from diffdfkd.engine.cutmix import mixed_steps

    synthesis, cutmix = recipe.synthesis, recipe.cutmix
    if cutmix.repair != "masked":
        return 0
    runs = step_runs(synthesis)
    mixes = sum(runs[step] * rows[step] for step in mixed_steps(cutmix, synthesis.steps))
    return cutmix.passes * (mixes + (synthesis.fan_out - 1) * rows[fork_step(synthesis) - 1])
