"""Priors made for a few steps: LCM-LoRA, LCM's own UNet and SD-Turbo, from their folder to finished images."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.painter import Models, Painter, Painting
from diffdfkd.engine.prior import Prior, load_prior, quiet
from diffdfkd.engine.recipe import LoraRecipe, PriorRecipe, Recipe
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import guidance_embedding, unet_stage
from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.philox import INITIAL_NOISE, STEP_NOISE, philox_normal
from diffdfkd.kernels.predict import predict
from diffdfkd.kernels.row import named, start_counter
from diffdfkd.kernels.step_inputs import Draw

CLASSES = ["coat", "bag", "shoe"]


@pytest.fixture
def lcm_lora(tiny_sd1: Path, tiny_lcm_lora: Path) -> Prior:
    return load_prior(PriorRecipe(path=str(tiny_sd1), loras=[LoraRecipe(path=str(tiny_lcm_lora))]), "cpu")


@pytest.fixture
def turbo(tiny_turbo: Path) -> Prior:
    return load_prior(PriorRecipe(path=str(tiny_turbo)), "cpu")


@pytest.fixture(scope="module")
def lcm_folder(
    prior_builder: Callable[..., Path],
    prior_families: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As SimianLuo/LCM_Dreamshaper_v7, small: SD 1.5's networks, the UNet told the guidance scale."""
    options = prior_families["sd1"]
    unet = {**options["unet"], "time_cond_proj_dim": 32}
    scheduler = {"_class_name": "LCMScheduler"}
    return prior_builder(tmp_path_factory.mktemp("lcm") / "lcm", **{**options, "unet": unet, "scheduler": scheduler})


def teacher() -> Classifier:
    torch.manual_seed(1)
    model = ARCHITECTURES["small_cnn"](channels=3, classes=len(CLASSES), width=4).eval().requires_grad_(False)
    return Classifier(model, Preprocessing(3, 32, (0.5,), (0.5,), "bilinear"), CLASSES).eval()


def paint(prior: Prior, sampler: str, steps: int, scale: float, **guidance: Any) -> tuple[Painting, list[int]]:
    """Six samples, and on how many rows the UNet was called each time."""
    recipe = Recipe.model_validate(
        {
            "prior": str(prior.folder),
            "teacher": {"architecture": "small_cnn", "classes": CLASSES},
            "student": {"architecture": "small_cnn"},
            "synthesis": {"sampler": sampler, "steps": steps, "guidance_scale": scale},
            "guidance": {"mode": "clean", **guidance},
        }
    )
    rows: list[int] = []
    with Painter(recipe, Models(prior, teacher()), 0) as painter:
        unet = painter.denoiser.unet

        def counted(sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            rows.append(len(sample))
            assert len(sample) == len(timestep) == len(context)
            return unet(sample, timestep, context)

        painter.denoiser.unet = counted
        return painter.paint(torch.arange(6), torch.arange(6) % 3), rows


@pytest.mark.parametrize(
    ("kind", "sampler", "steps"), [("lcm_lora", "lcm", 4), ("turbo", "euler", 4), ("turbo", "euler", 1)]
)
def test_guided_images_are_finite_and_the_same_again(
    kind: str, sampler: str, steps: int, request: pytest.FixtureRequest
) -> None:
    prior = request.getfixturevalue(kind)
    first, rows = paint(prior, sampler, steps, scale=1.0)
    assert rows == [6] * steps  # the unconditional half is not run
    assert first.alive.all() and first.images.shape == (6, 3, 32, 32)
    assert torch.isfinite(first.losses).all() and (first.losses[:, 2] > 0).all()
    again, _ = paint(prior, sampler, steps, scale=1.0)
    assert torch.equal(first.images, again.images) and torch.equal(first.losses, again.losses)
    unguided, _ = paint(prior, sampler, steps, scale=1.0, mode="none")
    assert not torch.equal(first.images, unguided.images)


def test_scale_above_one_runs_both_halves(lcm_lora: Prior) -> None:
    _, rows = paint(lcm_lora, "lcm", 2, scale=1.5)
    assert rows == [12, 12]


def test_guidance_lowers_its_loss_at_four_steps(lcm_lora: Prior) -> None:
    """Each guided step of LCM starts from what the last one left, so the last loss is below the unguided one's."""
    guided, _ = paint(lcm_lora, "lcm", 4, scale=1.0, rho=0.3)
    barely, _ = paint(lcm_lora, "lcm", 4, scale=1.0, rho=1e-6)
    assert guided.losses[-1, 0] < barely.losses[-1, 0]


def stock(prior: Prior, folder: Path, scheduler: str, steps: int, scale: float) -> torch.Tensor:
    """Latents of diffusers' own pipeline."""
    with quiet():
        pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal(3, torch.arange(2), 0, INITIAL_NOISE, prior.latent_shape)
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale, "latents": noise.clone()}
    return pipeline(CLASSES[:2], height=64, width=64, output_type="latent", **options).images


def ours(prior: Prior, sampler: str, steps: int, scale: float) -> torch.Tensor:
    table = make_table(sampler, prior.scheduler_config, steps)
    unet = unet_stage(prior, guidance_scale=scale)
    z = table.initial_scale * philox_normal(3, torch.arange(2), 0, INITIAL_NOISE, prior.latent_shape)
    context, counter = prior.embed(CLASSES[:2]), start_counter("cpu")
    with torch.no_grad():
        for step, row in enumerate(table.rows):
            output = unet(named(row).input_scale * z, table.timesteps[step].expand(2), context)
            prediction = predict(z, output, table.rows, counter, 1.0)
            noise = Draw(3, torch.arange(2)) if table.draws[step] else None
            z = advance(z, prediction, None, table.rows, counter, torch.ones(2, dtype=torch.bool), noise=noise).z
    return z


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_turbo_is_the_stock_pipeline(turbo: Prior, tiny_turbo: Path, steps: int) -> None:
    torch.testing.assert_close(
        ours(turbo, "euler", steps, 1.0),
        stock(turbo, tiny_turbo, "EulerDiscreteScheduler", steps, 1.0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_unet_that_is_told_the_scale_is_the_stock_pipeline(
    scale: float, lcm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LCM in four steps, the noise of its steps ours."""
    prior = load_prior(PriorRecipe(path=str(lcm_folder)), "cpu")
    assert prior.guidance_width == 32
    drawn = iter(range(4))

    def noise(*_: Any, **__: Any) -> torch.Tensor:
        return philox_normal(3, torch.arange(2), next(drawn), STEP_NOISE, prior.latent_shape)

    monkeypatch.setattr(importlib.import_module("diffusers.schedulers.scheduling_lcm"), "randn_tensor", noise)
    expected = stock(prior, lcm_folder, "LCMScheduler", 4, scale)
    torch.testing.assert_close(ours(prior, "lcm", 4, scale), expected, rtol=1e-4, atol=1e-4)
    assert (ours(prior, "lcm", 4, 3.0) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("width", [6, 7, 256])
def test_embedding_of_the_scale_is_diffusers_own(width: int) -> None:
    pipeline = diffusers.StableDiffusionPipeline
    for scale in (1.0, 2.5, 8.0):
        # In float32 its angles of thousands are a thousandth off; one logarithm of it always is float32.
        expected = pipeline.get_guidance_scale_embedding(
            None, torch.tensor([scale - 1.0], dtype=torch.float64), embedding_dim=width, dtype=torch.float64
        )
        torch.testing.assert_close(guidance_embedding(scale, width).double(), expected, rtol=0, atol=1e-4)


def test_unet_that_is_told_the_scale_runs_once(lcm_folder: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(lcm_folder)), "cpu")
    high, rows = paint(prior, "lcm", 2, scale=8.0)
    assert rows == [6, 6] and high.alive.all()
    low, _ = paint(prior, "lcm", 2, scale=1.0)
    assert not torch.equal(high.images, low.images)
    with pytest.raises(UserError, match=r"guidance\.rho_rule: cfg needs an unconditional half"):
        paint(prior, "lcm", 2, scale=8.0, rho_rule="cfg")


def test_run_says_once_that_a_schedule_begins_in_the_middle(tiny_sd1: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffdfkd.recipes.run import load_prior_for

    recipe = Recipe.model_validate(
        {
            "prior": str(tiny_sd1),
            "teacher": {"architecture": "small_cnn", "classes": CLASSES},
            "student": {"architecture": "small_cnn"},
            "synthesis": {"sampler": "euler", "steps": 1},
            "device": "cpu",
        }
    )
    load_prior_for(recipe, teacher())
    assert caplog.text.count("synthesis.steps: 1 step(s) of euler begin at timestep 0 of 1000") == 1
