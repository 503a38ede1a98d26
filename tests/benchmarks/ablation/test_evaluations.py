"""The formula against a sampler that counts its calls."""

import pytest
import torch
from torch import Tensor

from diffdfkd.benchmarks.ablation.evaluations import network_evaluations
from diffdfkd.engine.combinations import fork_step
from diffdfkd.engine.fan_out import plan_fan_out
from diffdfkd.engine.recipe import CutMixRecipe, load_recipe
from diffdfkd.engine.sampler import sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Gradient

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}
BATCH = 3


class Counting(torch.autograd.Function):
    """Half of its input; counts the rows that pass, forward and back."""

    rows = 0

    @staticmethod
    def forward(ctx: object, latents: Tensor) -> Tensor:
        Counting.rows += len(latents)
        return latents / 2

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        Counting.rows += len(gradients[0])
        return gradients[0] / 2


@pytest.mark.parametrize("mode", ["none", "clean", "reuse", "exact"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "more", [[], ["guidance.every=3"], ["guidance.window=[0.25,0.75]"], ["synthesis.fan_out=2", "synthesis.fork=0.5"]]
)
def test_evaluations_are_those_that_the_sampler_makes(mode: str, scale: float, more: list[str]) -> None:
    overrides = [f"guidance.mode={mode}", f"synthesis.guidance_scale={scale}", "synthesis.steps=8", *more]
    recipe = load_recipe("fashion", overrides)
    noise = torch.randn(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    calls = 0

    def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        nonlocal calls
        calls += len(x0)
        return Gradient(x0, x0.flatten(1).norm(dim=1), alive, torch.zeros(4))

    Counting.rows = 0
    fan_out = recipe.synthesis.fan_out
    ids = torch.arange(fan_out * BATCH).view(fan_out, BATCH)
    labels, fork = torch.arange(BATCH), fork_step(recipe.synthesis)
    sample(
        lambda latents, timestep, context: Counting.apply(latents),
        make_table("ddim", CONFIG, 8),
        torch.zeros(BATCH if scale == 1 else 2 * BATCH, 2, 4),
        scale=scale,
        noise=noise,
        sample_ids=ids[0],
        seed=0,
        guidance=recipe.guidance,
        plan=plan_fan_out(CutMixRecipe(partner="across"), labels, BATCH, 8, (4, 4), 0, ids, fork),
        chain=None if mode == "none" else chain,
    )
    assert network_evaluations(recipe) * fan_out * BATCH == Counting.rows + calls
