"""Our tables against diffusers' own schedulers: the same initial noise, the same step noise, the same model."""

import importlib
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.schedule import SCHEDULERS, late_start, make_table
from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.philox import INITIAL_NOISE, STEP_NOISE, philox_normal
from diffdfkd.kernels.predict import predict
from diffdfkd.kernels.row import named, start_counter

SHAPE = (4, 6, 5)
SEED = 3
SAMPLES = torch.tensor([0, 2**40 + 5])
ALIVE = torch.ones(2, dtype=torch.bool)
BASE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD1 = {**BASE, "_class_name": "PNDMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
SD2 = {**SD1, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "prediction_type": "v_prediction"}
ZERO_SNR = {**SD2, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
TURBO = {**SD1, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "timestep_type": "discrete"}
STEPS = (1, 2, 4, 12, 50)


def model(z: Tensor, timestep: Tensor | float) -> Tensor:
    """A smooth function of all its inputs that mixes neighbours and channels."""
    time = float(timestep) / 1000
    return torch.tanh(0.6 * z + 0.3 * z.roll(1, 1) - 0.2 * z.roll(1, 3) + time) - 0.4 * z.roll(1, 2) * (1 - time)


def step_noise(step: int) -> Tensor:
    return philox_normal(SEED, SAMPLES, step, STEP_NOISE, SHAPE)


def ours(sampler: str, config: dict[str, Any], steps: int) -> tuple[Tensor, list[float]]:
    table = make_table(sampler, config, steps)
    z = table.initial_scale * philox_normal(SEED, SAMPLES, 0, INITIAL_NOISE, SHAPE)
    previous, counter = None, start_counter("cpu")
    for step in range(steps):
        row = table.rows[step]
        output = model(named(row).input_scale * z, table.timesteps[step])
        prediction = predict(z, output, table.rows, counter, 1.0)
        noise = step_noise(step) if table.draws[step] else None
        z, previous, _ = advance(z, prediction, previous, table.rows, counter, ALIVE, noise=noise, keep_x0=True)
    return z, table.timesteps.tolist()


def theirs(
    sampler: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[float]]:
    scheduler: Any = getattr(diffusers, SCHEDULERS[sampler]).from_config(config)
    scheduler.set_timesteps(steps)
    drawn: list[int] = []
    if sampler in ("ddpm", "lcm"):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{sampler}")
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: step_noise(drawn[-1]))
    z = scheduler.init_noise_sigma * philox_normal(SEED, SAMPLES, 0, INITIAL_NOISE, SHAPE)
    for step, timestep in enumerate(scheduler.timesteps):
        drawn.append(step)
        output = model(scheduler.scale_model_input(z, timestep), timestep)
        z = scheduler.step(output, timestep, z).prev_sample
    return z, scheduler.timesteps.tolist()


def compare(
    sampler: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-4
) -> None:
    mine, mine_at = ours(sampler, config, steps)
    reference, reference_at = theirs(sampler, config, steps, monkeypatch)
    assert mine_at == pytest.approx(reference_at)
    assert reference.abs().max() > 0.01
    torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_sd1_configuration(sampler: str, prediction_type: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(sampler, {**SD1, "prediction_type": prediction_type}, steps, monkeypatch)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", [SD2, ZERO_SNR], ids=["leading", "zero-snr"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_sd2_configuration(sampler: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Diffusers' first Euler step from sigma 4096 subtracts float32 numbers of that size: an ulp of 5e-4 each, which
    # counts where the next sigma is small. Which way they round depends on the CPU.
    cancels = sampler == "euler" and config is ZERO_SNR and steps <= 2
    compare(sampler, config, steps, monkeypatch, tolerance=1e-3 if cancels else 1e-4)


def test_euler_at_zero_terminal_snr_does_not_cancel() -> None:
    """One step from sigma 4096 against x0 = alpha z - sigma v in float64, with z of unit variance."""
    z = philox_normal(SEED, SAMPLES, 0, INITIAL_NOISE, SHAPE).double()
    ratio = 4095.9999
    alpha = (1 + ratio**2) ** -0.5
    scaled = z * ratio * alpha
    expected = alpha * scaled - ratio * alpha * model(scaled, 999.0)
    torch.testing.assert_close(ours("euler", ZERO_SNR, 1)[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {"timestep_spacing": "linspace", "set_alpha_to_one": True}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "prediction_type": "sample"}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_small_log", "timestep_spacing": "linspace"}),
        ("euler", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
        ("euler", {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
        ("dpmsolver++", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmsolver++", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmsolver++", {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
        ("dpmsolver++", {"solver_order": 1}),
        ("lcm", {"original_inference_steps": 20, "timestep_scaling": 0.01}),
    ],
)
@pytest.mark.parametrize("steps", [3, 18])
def test_options_of_the_configuration(
    sampler: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(sampler, {**SD1, **options}, steps, monkeypatch)


@pytest.mark.parametrize("steps", range(1, 9))
def test_lcm_on_sd1_at_a_few_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LCM-LoRA is sampled: the teacher's 50 timesteps, evenly skipped, from 999 on."""
    compare("lcm", SD1, steps, monkeypatch)
    assert make_table("lcm", SD1, steps).timesteps[0] == 999


@pytest.mark.parametrize("steps", range(1, 5))
def test_turbo_configuration(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compare("euler", TURBO, steps, monkeypatch)
    assert make_table("euler", TURBO, steps).timesteps.tolist() == [
        round(1000 - 1000 * step / steps) - 1 for step in range(steps)
    ]


def test_ancestral_euler_of_a_turbo_folder_is_euler_in_one_step() -> None:
    """Its noise is that of the level it goes to, which is zero at the end; in more steps ours adds none either."""
    table = make_table("euler", {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}, 1)
    scheduler: Any = diffusers.EulerAncestralDiscreteScheduler.from_config(TURBO)
    scheduler.set_timesteps(1)
    z = scheduler.init_noise_sigma * philox_normal(SEED, SAMPLES, 0, INITIAL_NOISE, SHAPE)
    output = model(scheduler.scale_model_input(z, scheduler.timesteps[0]), scheduler.timesteps[0])
    expected = scheduler.step(output, scheduler.timesteps[0], z).prev_sample
    torch.testing.assert_close(ours("euler", TURBO, 1)[0], expected, rtol=1e-4, atol=1e-4)
    assert not any(table.draws)


@pytest.mark.parametrize(
    ("sampler", "config", "steps", "said"),
    [
        ("euler", "leading", 1, True),
        ("ddim", "leading", 2, True),
        ("ddim", "leading", 4, False),
        ("euler", "trailing", 1, False),
        ("lcm", "leading", 1, False),
    ],
)
def test_schedule_that_begins_in_the_middle_is_said(sampler: str, config: str, steps: int, said: bool) -> None:
    scheduler_config = {**SD1, "timestep_spacing": config}
    word = late_start(make_table(sampler, scheduler_config, steps), scheduler_config)
    assert (word is not None) == said
    if word is not None:
        assert word.startswith(f"{steps} step(s) of {sampler} begin at timestep {1 if steps == 1 else 501} of 1000")


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_rows_recover_x0_and_eps(sampler: str) -> None:
    """Whatever the prediction type, a perfect model's output gives back the x0 and eps that z was made of."""
    x0, eps = torch.randn(2, 1, 4, 8, 8).double()
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        table = make_table(sampler, {**SD1, "prediction_type": prediction_type}, 7)
        for tensor in table.rows:
            row = named(tensor.double())
            z = (row.alpha * x0 + row.sigma * eps) / (row.input_scale if sampler == "euler" else 1)
            output = {"epsilon": eps, "v_prediction": row.alpha * eps - row.sigma * x0, "sample": x0}[prediction_type]
            torch.testing.assert_close(row.x0_z * z + row.x0_m * output, x0, rtol=0, atol=2e-5)
            torch.testing.assert_close(row.eps_z * z + row.eps_m * output, eps, rtol=0, atol=2e-5)


def test_guidance_of_x0_holds_eps() -> None:
    """DDIM: a change of x0 by g moves z' by alpha' g (the C of A z + B eps - C g), and so in every sampler but LCM."""
    for sampler in SCHEDULERS:
        table = make_table(sampler, SD1, 10)
        for now, following in zip(table.rows[:-1], table.rows[1:], strict=True):
            expected = 1.0 if sampler == "euler" else float(named(following).alpha)
            moved = float(named(now).x0 + named(now).previous)
            if sampler == "ddpm":
                # Ancestral noise takes the place of some of eps, not of x0.
                assert float(named(now).eps ** 2 + named(now).noise ** 2) == pytest.approx(
                    float(named(following).sigma) ** 2, abs=1e-5
                )
            assert moved == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("sampler", "options", "words"),
    [
        ("ddim", {"clip_sample": True}, "clip_sample=True"),
        ("ddim", {"prediction_type": "flow"}, "prediction_type=flow"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type=learned_range"),
        ("dpmsolver++", {"solver_order": 3}, "solver_order=3"),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("ddim", {"beta_schedule": "none such"}, "none such"),
        ("plms", {}, "synthesis.sampler"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "v_prediction"),
    ],
)
def test_what_cannot_be_honoured_is_refused(sampler: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_table(sampler, {**SD1, **options}, 5)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 0), ("ddim", 1001), ("ddim", 1000), ("lcm", 51)])
def test_impossible_numbers_of_steps_are_refused(sampler: str, steps: int) -> None:
    with pytest.raises(UserError, match=r"synthesis\.steps"):
        make_table(sampler, SD1, steps)
