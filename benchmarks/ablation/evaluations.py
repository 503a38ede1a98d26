"""How many times networks are evaluated for one image: the measure of cost that no machine changes.

    N = S r + G (1 + b r)

S steps; r rows of the UNet for an image, 2 with classifier-free guidance and 1 without; G guided steps, each with one
call of the guidance chain (decoder and teacher, forward and back, counted once). b is what the mode asks of the UNet at
a guided step beside its own call: 0 in ``clean``; 1 in ``reuse``, its gradient; 2 in ``exact``, the gradient and a
second call at the moved latents.
"""

from diffdfkd.engine.combinations import guided_steps
from diffdfkd.engine.recipe import Recipe

BESIDE = {"none": 0, "clean": 0, "reuse": 1, "exact": 2}


def network_evaluations(recipe: Recipe) -> int:
    """N of the recipe's synthesis."""
    rows = 1 if recipe.synthesis.guidance_scale == 1 else 2
    guided = sum(guided_steps(recipe.guidance, recipe.synthesis.steps))
    return recipe.synthesis.steps * rows + guided * (1 + BESIDE[recipe.guidance.mode] * rows)
