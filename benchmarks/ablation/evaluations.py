"""How many times networks are evaluated for one image: the measure of cost that no machine changes.

    N = [ sum over the steps of u (r + g (1 + b r)) + M ] / m

u: how often a step is run for a trajectory, once up to the fork and once for each of its m images after it (fan-out);
r: rows of the UNet for an image, 2 where classifier-free guidance acts and 1 elsewhere; g: 1 in a guided step, which
has one call of the guidance chain (decoder and teacher, forward and back, counted once). b is what the mode asks of the
UNet at a guided step beside its own call: 0 in ``clean``; 1 in ``reuse``, its gradient; 2 in ``exact``, the gradient
and a second call at the moved latents. M: rows that mend seams (``cutmix.repair: masked``), at most.

A call is a call: a light decoder's chain counts as the full one's, and a step on reused features as the whole UNet.
"""

from diffdfkd.engine.calls import mending_rows, rows_by_step
from diffdfkd.engine.combinations import guided_steps, step_runs
from diffdfkd.engine.recipe import Recipe

BESIDE = {"none": 0, "clean": 0, "reuse": 1, "exact": 2}


def network_evaluations(recipe: Recipe) -> float:
    """N of the recipe's synthesis."""
    synthesis, beside = recipe.synthesis, BESIDE[recipe.guidance.mode]
    rows, guided = rows_by_step(recipe), guided_steps(recipe.guidance, synthesis.steps)
    steps = zip(step_runs(synthesis), rows, guided, strict=True)
    trajectory = sum(run * (row + steers * (1 + beside * row)) for run, row, steers in steps)
    return (trajectory + mending_rows(recipe, rows)) / synthesis.fan_out
