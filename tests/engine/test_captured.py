"""Recorded steps without a GPU: the body is called again where a graph would be replayed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffdfkd.engine.captured import CapturedSampler
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe
from diffdfkd.engine.sampler import Alone, sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import Gradient
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


def unet(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return 0.3 * sample.tanh() + 0.01 * context.mean((1, 2)).view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1) / 1000


def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
    finite = alive & torch.isfinite(x0).flatten(1).all(1)
    gradient = torch.where(finite.view(-1, 1, 1, 1), x0 - targets.argmax(1).view(-1, 1, 1, 1), 0)
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
    return Gradient(gradient, norm, finite, torch.stack([norm.mean()] * 4))


def again(body: Callable[[], None]) -> Callable[[], None]:
    """A recorder that, as the real one does, runs the body once beforehand."""
    body()
    return body


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpmsolver++", "lcm"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("guided", [True, False])
def test_trajectories_are_those_of_the_plain_loop(sampler: str, scale: float, guided: bool) -> None:
    table = make_table(sampler, CONFIG, STEPS)
    guidance = GuidanceRecipe(window=(0.0, 0.7)) if guided else GuidanceRecipe(mode="none")
    steering = chain if guided else None
    copies = 2 if scale != 1 else 1
    captured = CapturedSampler(
        unet,
        table,
        scale=scale,
        shape=(B, *SHAPE),
        context=(copies * B, 4, 3),
        classes=CLASSES,
        seed=5,
        guidance=guidance,
        chain=steering,
        kernel="reference",
        device=torch.device("cpu"),
        record=again,
    )
    for batch, every in enumerate((0, 2, 0)):
        ids = torch.arange(B) + 10 * batch
        context = torch.randn(copies * B, 4, 3, generator=torch.Generator().manual_seed(batch))
        cutmix = CutMixRecipe(every=every, partner="any", probability=1.0)
        plan = plan_cutmix(cutmix, ids % CLASSES, CLASSES, STEPS, SHAPE[1:], 5, ids)
        noise = philox_normal(5, ids, 0, INITIAL_NOISE, SHAPE)
        if batch == 1:
            noise[2] = torch.nan
        expected = sample(
            unet,
            table,
            context,
            scale=scale,
            noise=noise,
            sample_ids=ids,
            seed=5,
            guidance=guidance,
            plan=plan,
            chain=steering,
            kernel="reference",
        )
        found = captured(context, noise, ids, plan)
        for name in ("latents", "alive", "targets", "losses", "frozen"):
            a, b = getattr(found, name), getattr(expected, name)
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), name
        assert found.latents.data_ptr() != captured.z.data_ptr()
    kinds = {key[0].guided for key in captured.replays}
    assert kinds == ({True, False} if guided else {False})


def lazy(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
    """A light decoder's chain, another one than the full's."""
    return chain(x0 + 1, targets, alive, weights)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("mixed", [0, 2])
def test_recorded_steps_know_their_chain_and_their_rows(sampler: str, mixed: int) -> None:
    """Two chains and an interval of classifier-free guidance, over two batches: as in the plain loop."""
    table = make_table(sampler, CONFIG, STEPS)
    guidance = GuidanceRecipe(window=(0.0, 0.7), decoder="light", decoder_window=(0.0, 0.3))
    alone = Alone([True, False, False, False, True], unet)
    captured = CapturedSampler(
        unet,
        table,
        scale=3.0,
        shape=(B, *SHAPE),
        context=(2 * B, 4, 3),
        classes=CLASSES,
        seed=5,
        guidance=guidance,
        chain=chain,
        light=lazy,
        alone=alone,
        kernel="reference",
        device=torch.device("cpu"),
        record=again,
    )
    for batch in range(2):
        ids = torch.arange(B) + 10 * batch
        context = torch.randn(2 * B, 4, 3, generator=torch.Generator().manual_seed(batch))
        cutmix = CutMixRecipe(every=mixed, partner="any", probability=1.0)
        plan = plan_cutmix(cutmix, ids % CLASSES, CLASSES, STEPS, SHAPE[1:], 5, ids)
        noise = philox_normal(5, ids, 0, INITIAL_NOISE, SHAPE)
        expected = sample(
            unet,
            table,
            context,
            scale=3.0,
            noise=noise,
            sample_ids=ids,
            seed=5,
            guidance=guidance,
            plan=plan,
            chain=chain,
            light=lazy,
            alone=alone,
            kernel="reference",
        )
        found = captured(context, noise, ids, plan)
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.losses.nan_to_num(), expected.losses.nan_to_num())
    kinds = {(kind.guided, kind.light, kind.doubled, kind.next_doubled) for kind, _, _ in captured.replays}
    assert kinds == {
        (True, True, False, True),
        (True, True, True, True),
        (True, False, True, True),
        (True, False, True, False),
        (False, False, False, False),
    }
