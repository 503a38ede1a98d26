"""Schedules over the steps against the plain loop: what the chain is told, and how far its gradient is followed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdfkd.engine import sampler
from diffdfkd.engine.captured import CapturedSampler
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.guidance_schedule import GuidanceSchedule
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe
from diffdfkd.engine.sampler import Trajectory, sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Chain, Gradient
from diffdfkd.kernels.move import move
from diffdfkd.kernels.philox import INITIAL_NOISE, philox_normal

B, SHAPE, CLASSES, STEPS = 6, (2, 4, 4), 3, 5
CONFIG = {
    "num_train_timesteps": 100,
    "beta_start": 0.001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}
WINDOWS = {"class_window": (0.0, 0.5), "batchnorm_window": (0.3, 1.0)}


def unet(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return 0.3 * sample.tanh() + 0.01 * context.mean((1, 2)).view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1) / 1000


def goal(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
    gradient = x0 - targets.argmax(1).view(-1, 1, 1, 1)
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
    return Gradient(gradient, norm, alive, torch.stack([norm.mean()] * 4))


def again(body: Callable[[], None]) -> Callable[[], None]:
    """In the place of a recorder, which runs the body once beforehand."""
    body()
    return body


def weighed(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
    """A chain whose gradient hangs on the weights of its terms."""
    found = goal(x0, targets, alive, weights)
    gradient = weights[0] * found.gradient + weights[1] * x0.sin()
    return found._replace(gradient=gradient, norm=torch.linalg.vector_norm(gradient, dim=(1, 2, 3)))


def trajectory(guidance: GuidanceRecipe, chain: Chain, captured: bool = False, method: str = "ddim") -> Trajectory:
    table = make_table(method, CONFIG, STEPS)
    ids = torch.arange(B)
    plan = plan_cutmix(CutMixRecipe(every=0), ids % CLASSES, CLASSES, STEPS, SHAPE[1:], 5, ids)
    noise = philox_normal(5, ids, 0, INITIAL_NOISE, SHAPE)
    context = torch.randn(B, 4, 3, generator=torch.Generator().manual_seed(0))
    shared: dict[str, Any] = {"scale": 1.0, "seed": 5, "guidance": guidance, "chain": chain, "kernel": "reference"}
    if not captured:
        return sample(unet, table, context, noise=noise, sample_ids=ids, plan=plan, **shared)
    steps = CapturedSampler(
        unet,
        table,
        shape=(B, *SHAPE),
        context=(B, 4, 3),
        classes=CLASSES,
        device=torch.device("cpu"),
        record=again,
        **shared,
    )
    steps(context, noise, ids, plan)  # whose recordings serve the next batch as well
    return steps(context, noise, ids, plan)


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
def test_the_chain_is_told_the_weights_of_each_step(mode: str) -> None:
    told = []

    def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        told.append(weights.tolist())
        return weighed(x0, targets, alive, weights)

    fields = {"mode": mode, "class_weight": 1.0, "batchnorm_weight": 0.5, **WINDOWS}
    trajectory(GuidanceRecipe.model_validate(fields), chain)
    assert told == [[1, 0, 0], [1, 0, 0], [1, 0.5, 0], [0, 0.5, 0], [0, 0.5, 0]]


@pytest.mark.parametrize("method", ["ddim", "ddpm", "dpmsolver++"])
def test_recorded_steps_know_where_they_are(method: str) -> None:
    guidance = GuidanceRecipe(batchnorm_weight=0.5, rho_schedule="falling", **WINDOWS)
    plain, recorded = (trajectory(guidance, weighed, captured, method) for captured in (False, True))
    assert torch.equal(plain.latents, recorded.latents) and plain.alive.all()
    constant = trajectory(GuidanceRecipe(batchnorm_weight=0.5), weighed, True, method)
    assert not torch.equal(constant.latents, recorded.latents)


@pytest.mark.parametrize("rule", ["raw", "unit"])
def test_rho_is_scaled_step_by_step(rule: str) -> None:
    fields = {"rho_rule": rule, "rho": 0.1, "window": (0.6, 1.0)}
    rising = trajectory(GuidanceRecipe.model_validate({**fields, "rho_schedule": "rising"}), goal)
    calls = []

    def scaled(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        """The schedule made by hand: another gradient under ``raw``, another norm under ``unit``."""
        factor = (2 / 3, 4 / 3)[len(calls)]
        calls.append(factor)
        found = goal(x0, targets, alive, weights)
        if rule == "raw":
            return found._replace(gradient=factor * found.gradient)
        return found._replace(norm=found.norm / factor)

    by_hand = trajectory(GuidanceRecipe.model_validate(fields), scaled)
    torch.testing.assert_close(rising.latents, by_hand.latents, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(trajectory(GuidanceRecipe.model_validate(fields), goal).latents, rising.latents)


@pytest.mark.parametrize("mode", ["reuse", "exact"])
def test_z_is_moved_by_the_steps_own_rho(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """There the norm is that of z's gradient, of which a factor would come out again."""
    told = []

    def moved(*given: Any, **options: Any) -> Any:
        told.append(given[5].rho)
        return move(*given, **options)

    monkeypatch.setattr(sampler, "move", moved)
    fields = {"mode": mode, "rho": 0.1, "window": (0.6, 1.0), "rho_schedule": "falling"}
    trajectory(GuidanceRecipe.model_validate(fields), goal)
    assert told == pytest.approx([0.1 * 4 / 3, 0.1 * 2 / 3])


def test_constant_weights_cost_no_launch() -> None:
    schedule = GuidanceSchedule.of(GuidanceRecipe(), [True, True, False], torch.device("cpu"))
    assert schedule.weights.shape == (1, 3) and schedule.rho is None
    # Steps that are not guided are of no account.
    fields = GuidanceRecipe(class_window=(0.0, 0.6))
    assert len(GuidanceSchedule.of(fields, [True, True, False], torch.device("cpu")).weights) == 1
    assert len(GuidanceSchedule.of(fields, [True, True, True], torch.device("cpu")).weights) == 3
    gradient = torch.ones(2)
    assert schedule.followed(gradient, torch.zeros(2, dtype=torch.int32)) is gradient
