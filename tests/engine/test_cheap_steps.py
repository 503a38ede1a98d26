"""Which steps are cheap, and trajectories with them against the loop written down naively."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffdfkd.engine.cheap_steps import light_steps, prompt_alone_steps, whole_steps
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe, SynthesisRecipe
from diffdfkd.engine.sampler import Alone, sample
from diffdfkd.engine.schedule import Table, make_table
from diffdfkd.engine.stages import Gradient
from diffdfkd.kernels.row import row_at

B, LATENT, STEPS, SCALE = 4, (2, 4, 4), 6, 3.0
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}


def test_light_steps_are_those_of_the_window() -> None:
    full, light = GuidanceRecipe(), {"decoder": "a.safetensors"}
    assert not any(light_steps(full, 6))
    assert all(light_steps(GuidanceRecipe(**light), 6))
    windowed = GuidanceRecipe(**light, decoder_window=(0.5, 1.0))
    assert light_steps(windowed, 6) == [False, False, False, True, True, True]
    assert not any(light_steps(windowed.model_copy(update={"mode": "none"}), 6))


def test_steps_outside_the_interval_run_on_the_prompt_alone() -> None:
    inside = SynthesisRecipe(steps=5, guidance_interval=(0.2, 0.6))
    assert prompt_alone_steps(inside) == [True, False, False, True, True]
    assert not any(prompt_alone_steps(inside.model_copy(update={"guidance_scale": 1.0})))


def test_whole_steps_by_hand() -> None:
    wide, plain = [True] * 7, [False] * 7
    assert whole_steps(1, wide, plain) == [True] * 7
    assert whole_steps(3, wide, plain) == [True, False, False, True, False, False, True]
    # A mix after step 1: step 2 begins anew.
    mixes = [False, True, *[False] * 5]
    assert whole_steps(3, wide, mixes) == [True, False, True, False, False, True, False]
    # The prompt alone in steps 0 and 1, and again from 4 on: only where guidance sets in is anything missing.
    widths = [False, False, True, True, False, False, False]
    assert whole_steps(4, widths, plain) == [True, False, True, False, False, False, True]


class Toy:
    """A UNet of which the shallow form keeps what the last whole call made."""

    def __init__(self) -> None:
        self.weight = 0.3 * torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
        self.calls: list[tuple[str, int]] = []
        self.kept = torch.zeros(0)

    def deep(self, sample: Tensor, context: Tensor) -> Tensor:
        mixed = torch.nn.functional.conv2d(sample, self.weight, padding=1)
        return torch.tanh(mixed + context.mean(1)[:, :2, None, None])

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        self.calls.append(("whole", len(sample)))
        self.kept = self.deep(sample, context)
        return self.kept + 0.1 * sample * (timestep / 1000)[:, None, None, None]

    def shallow(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        self.calls.append(("shallow", len(sample)))
        return self.kept[-len(sample) :] + 0.1 * sample * (timestep / 1000)[:, None, None, None]


def pull(towards: float) -> Any:
    def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        gradient = x0 - towards
        return Gradient(gradient, gradient.flatten(1).norm(dim=1), alive, torch.full((4,), towards))

    return chain


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(B, *LATENT, generator=generator), torch.randn(2 * B, 3, 4, generator=generator)


def trajectory(unet: Any, table: Table, guidance: GuidanceRecipe, *, mix: int = 0, **forms: Any) -> Any:
    noise, context = inputs()
    ids = torch.arange(B)
    plan = plan_cutmix(CutMixRecipe(every=mix, probability=1.0, partner="any"), ids, B, STEPS, LATENT[1:], 7, ids)
    given = {"chain": pull(1.0), "light": pull(-1.0), "scale": SCALE, "seed": 7, "kernel": "reference"}
    return sample(unet, table, context, noise=noise, sample_ids=ids, guidance=guidance, plan=plan, **{**given, **forms})


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
def test_interval_and_decoder_window_against_the_naive_loop(mode: Any) -> None:
    table = make_table("ddim", CONFIG, STEPS)
    alone = [True, True, False, False, True, True]
    light = [False, False, False, True, True, True]
    guidance = GuidanceRecipe(mode=mode, rho=0.1, rho_rule="raw", decoder="light", decoder_window=(0.5, 1.0))
    toy = Toy()
    found = trajectory(toy, table, guidance, alone=Alone(alone, toy))

    noise, context = inputs()
    z, naive, losses = noise, Toy(), []
    for step in range(STEPS):
        row, time = row_at(table.rows, torch.tensor([step])), table.timesteps[step]

        def look(z: Tensor, step: int = step, row: Any = row, time: Tensor = time) -> tuple[Tensor, Tensor]:
            bound = naive(row.input_scale * z, time.repeat(B), context[B:])
            m = bound
            if not alone[step]:
                free = naive(row.input_scale * z, time.repeat(B), context[:B])
                m = free + SCALE * (bound - free)
            return row.x0_z * z + row.x0_m * m, row.eps_z * z + row.eps_m * m

        goal = -1.0 if light[step] else 1.0
        losses.append(goal)
        leaf = z.detach().requires_grad_()
        x0, eps = look(leaf)
        if mode == "clean":
            x0 = x0.detach() - 0.1 * (x0.detach() - goal)
        else:
            (gradient,) = torch.autograd.grad(((x0 - goal) ** 2).sum() / 2, leaf)
            z = z - 0.1 * gradient
            if mode == "exact":
                x0, eps = look(z)
            else:
                x0 = (z - row.sigma * eps) / row.alpha
        z = (row.x0 * x0 + row.eps * eps).detach()
    torch.testing.assert_close(found.latents, z, atol=2e-4, rtol=1e-4)
    assert found.losses[:, 0].tolist() == losses
    rows = [rows for _, rows in toy.calls]
    calls = 2 if mode == "exact" else 1
    assert rows == [count for step in range(STEPS) for count in [B if alone[step] else 2 * B] * calls]


def test_a_step_without_its_chain_is_an_error() -> None:
    table = make_table("ddim", CONFIG, STEPS)
    guidance = GuidanceRecipe(decoder="light", decoder_window=(0.5, 1.0))
    with pytest.raises(ValueError, match="light: missing"):
        trajectory(Toy(), table, guidance, light=None)


@pytest.mark.parametrize(("mix", "expected"), [(0, "WssWss"), (2, "WsWsWs")])
def test_features_are_reused_and_made_anew_after_a_mix(mix: int, expected: str) -> None:
    table = make_table("dpmsolver++", CONFIG, STEPS)
    toy = Toy()
    trajectory(toy, table, GuidanceRecipe(), mix=mix, light=None, reuse_every=3)
    assert "".join({"whole": "W", "shallow": "s"}[form] for form, _ in toy.calls) == expected


def test_kept_features_serve_the_prompt_alone() -> None:
    """Where classifier-free guidance ends the prompt's half is taken; where it sets in the whole UNet runs."""
    table = make_table("ddim", CONFIG, STEPS)
    toy = Toy()
    alone = [True, True, False, False, True, True]
    trajectory(toy, table, GuidanceRecipe(), light=None, reuse_every=6, alone=Alone(alone, toy))
    assert toy.calls == [
        *[("whole", B), ("shallow", B), ("whole", 2 * B)],
        *[("shallow", 2 * B), ("shallow", B), ("shallow", B)],
    ]


def test_reuse_needs_a_unet_that_keeps_features() -> None:
    table = make_table("ddim", CONFIG, STEPS)
    with pytest.raises(ValueError, match="keeps no features"):
        trajectory(lambda sample, timestep, context: sample, table, GuidanceRecipe(), light=None, reuse_every=2)
