"""A light decoder from its making to a run with it, and runs with an interval and reused features."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdfkd.engine import denoiser
from diffdfkd.engine.backends.choose import settle_engines, stage_calls
from diffdfkd.engine.backends.serve import stages_of
from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.guidance_decoder import read_guidance_decoder
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.shards import list_shards
from diffdfkd.recipes import distill_decoder
from diffdfkd.recipes.dry_run import dry_run
from diffdfkd.recipes.run import load_prior_for

Call = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, good_recipe: dict[str, Any]) -> Path:
    """A decoder's file, distilled for a moment."""
    path = tmp_path_factory.mktemp("light") / "light.safetensors"
    text = distill_decoder.distill_decoder(
        load_recipe(good_recipe), path, steps=150, width=8, images=8, learning_rate=1e-2
    )
    assert "cosine" in text and all(level in text for level in ("early", "middle", "late"))
    return path


def test_decoder_command(good_recipe: dict[str, Any], tmp_path: Path, command_line: Call) -> None:
    """Equal commands give equal files, nothing else stays, and more steps come closer to the full decoder."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(good_recipe))
    errors = {}
    for name, steps in (("a", 1), ("b", 1), ("c", 100)):
        output = tmp_path / "made" / f"{name}.safetensors"
        arguments = ["decoder", str(recipe), f"--output={output}", f"--steps={steps}", "--images=6", "--form=linear"]
        code, out, _ = command_line([*arguments, "--learning-rate=0.02"])
        assert code == 0 and f"guidance.decoder={output}" in out
        errors[name] = float(out.split("late")[1].split()[0])
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert made == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert (tmp_path / "made" / "a.safetensors").read_bytes() == (tmp_path / "made" / "b.safetensors").read_bytes()
    assert errors["c"] < errors["a"]
    assert read_guidance_decoder(tmp_path / "made" / "a.safetensors").shape.scale == 4


def test_decoder_command_goes_on_where_it_was_killed(
    good_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, plain, calls = load_recipe(good_recipe), distill_decoder.losses, []

    def distil(name: str) -> bytes:
        output = tmp_path / f"{name}.safetensors"
        distill_decoder.distill_decoder(recipe, output, steps=120, width=4, images=4)
        return output.read_bytes()

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 110:
            raise KeyboardInterrupt
        return plain(*given)

    undisturbed = distil("undisturbed")
    monkeypatch.setattr(distill_decoder, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        distil("killed")
    assert not (tmp_path / "killed.safetensors").exists()
    assert distil("killed") == undisturbed
    assert len(calls) == 110 + 20
    assert not list(tmp_path.glob(".*.checkpoint"))


def test_interval_needs_a_second_half(
    good_recipe: dict[str, Any], prior_builder: Callable[..., Path], tmp_path: Path
) -> None:
    told = prior_builder(tmp_path / "told", unet={"time_cond_proj_dim": 8})
    recipe = load_recipe({**good_recipe, "prior": str(told)}, ["synthesis.guidance_interval=[0,0.5]"])
    with pytest.raises(UserError, match=r"synthesis\.guidance_interval: .* takes the guidance scale"):
        painted(recipe, loaded(recipe))


def test_run_with_a_light_decoder(
    light: Path, good_recipe: dict[str, Any], tmp_path: Path, command_line: Call, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, moved = tmp_path / "recipe.yaml", tmp_path / "moved.safetensors"
    recipe.write_text(json.dumps(good_recipe))
    command = ["synthesize", str(recipe), f"output={tmp_path / 'run'}"]
    assert command_line([*command, f"guidance.decoder={light}"])[0] == 0
    events = {event["event"]: event for event in read_journal(tmp_path / "run" / "metrics.jsonl")}
    assert set(events["guidance_decoder"]["cosines"]) == {"early", "middle", "late"}
    (sidecar, *_) = list_shards(tmp_path / "run" / "synthetic", 0)
    assert len(sidecar.choices["guidance.decoder"]) == 64
    assert sidecar.choices["guidance.decoder_window"] == [0.0, 1.0]
    # Other images than through the full decoder, whose shards do not name it.
    assert command_line([*command[:2], f"output={tmp_path / 'full'}"])[0] == 0
    (full, *_) = list_shards(tmp_path / "full" / "synthetic", 0)
    assert full.sha256 != sidecar.sha256 and "guidance.decoder" not in full.choices
    # The same file elsewhere will do; neither another one nor the full decoder does.
    shutil.copyfile(light, moved)
    assert command_line([*command, f"guidance.decoder={moved}"])[0] == 0
    code, _, err = command_line(command)
    assert code == 2 and err.startswith("error: guidance.decoder: ")
    content = bytearray(light.read_bytes())
    content[-2] ^= 1
    moved.write_bytes(content)
    code, _, err = command_line([*command, f"guidance.decoder={moved}"])
    assert code == 2 and "are not those that the run" in err


def painted(recipe: Recipe, models: Models, **options: Any) -> Any:
    with Painter(recipe, models, 0) as painter:
        ids = torch.arange(4)
        return painter.paint(ids, ids % 4, **options)


def loaded(recipe: Recipe) -> Models:
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    return Models(load_prior_for(recipe, teacher), teacher)


def test_window_of_no_light_step_is_the_full_decoder(light: Path, good_recipe: dict[str, Any]) -> None:
    """Two chains: the losses of a step are those of its own decoder, and final images are the VAE's."""
    common = ["kernel=reference", "device=cpu"]
    full = load_recipe(good_recipe, common)
    everywhere = load_recipe(good_recipe, [*common, f"guidance.decoder={light}"])
    late = load_recipe(good_recipe, [*common, f"guidance.decoder={light}", "guidance.decoder_window=[0.6,1]"])
    models = loaded(everywhere)
    losses = {name: painted(recipe, models).losses for name, recipe in (("full", full), ("late", late))}
    losses["light"] = painted(everywhere, models).losses
    assert torch.equal(losses["late"][:2], losses["full"][:2])
    assert not torch.equal(losses["late"][2], losses["full"][2])
    assert not torch.equal(losses["light"][0], losses["full"][0])
    unguided = [painted(recipe, models, guided=False).images for recipe in (full, everywhere)]
    assert torch.equal(*unguided)


def test_stages_of_a_recipe(good_recipe: dict[str, Any]) -> None:
    def stages(*overrides: str) -> list[str]:
        return stages_of(load_recipe(good_recipe, overrides))

    light = "guidance.decoder=a.safetensors"
    assert stages() == ["unet", "chain"]
    assert stages("guidance.mode=none") == ["unet"]
    assert stages(light) == ["unet", "light chain"]
    assert stages(light, "guidance.decoder_window=[0,0.5]") == ["unet", "chain", "light chain"]
    assert stages("synthesis.guidance_interval=[0,0.5]", "guidance.mode=exact") == [
        *("unet", "unet alone", "vjp", "vjp alone", "chain")
    ]
    calls = stage_calls(load_recipe(good_recipe, [light, "guidance.decoder_window=[0.6,1]"]))
    assert calls == {"unet": 6, "chain": 4}
    assert stage_calls(load_recipe(good_recipe, [light])) == {"unet": 6, "light chain": 6}


def test_engines_serve_both_chains_and_both_numbers_of_rows(
    light: Path, good_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another precision even eager stages are engines: each is opened once, and images come out alike."""
    overrides = [
        *("kernel=reference", "device=cpu", f"guidance.decoder={light}", "guidance.decoder_window=[0.6,1]"),
        *("synthesis.guidance_interval=[0.3,0.6]", "guidance.rho=0.01"),
    ]
    recipe = load_recipe(good_recipe, overrides)
    models = loaded(recipe)
    opened = []
    plain = denoiser.open_engine

    def watched(subject: Any, stage: str, *rest: Any) -> Any:
        built = plain(subject, stage, *rest)
        opened.append((stage, built.runner.specification.rows))
        return built

    monkeypatch.setattr(denoiser, "open_engine", watched)
    eager = painted(recipe, models)
    assert not opened
    engine = recipe.engine.model_copy(update={"unet": "eager", "chain": "eager", "precision": "bfloat16"})
    served = painted(recipe.model_copy(update={"engine": engine}), models)
    assert opened == [("unet", 8), ("unet alone", 4), ("chain", 4), ("light chain", 4)]
    assert (served.images.float() - eager.images.float()).abs().mean() < 8


def test_reuse_is_eager_and_close_to_the_whole(good_recipe: dict[str, Any]) -> None:
    common = ["kernel=reference", "device=cpu", "synthesis.steps=6", "guidance.mode=none"]
    whole, reusing = (load_recipe(good_recipe, [*common, f"synthesis.reuse_every={n}"]) for n in (1, 3))
    models = loaded(whole)
    a, b = (painted(recipe, models) for recipe in (whole, reusing))
    difference = (a.images.float() - b.images.float()).abs().mean()
    assert 0 < difference < 10
    settled, choices = settle_engines(reusing, lambda: pytest.fail("nothing is tried"))
    assert settled.engine.unet == "eager" and "reuse_every=3" in next(c.reason for c in choices if c.stage == "unet")


def test_dry_run_counts_what_is_spared(light: Path, good_recipe: dict[str, Any], tmp_path: Path) -> None:
    common = [f"output={tmp_path / 'run'}", "threads=1"]
    text = " ".join(dry_run(load_recipe(good_recipe, common))[0].split())
    assert "3 steps of ddim, each twice for classifier-free guidance 2: 6 calls an image, 48 in all" in text
    cheap = [
        *("synthesis.guidance_interval=[0,0.3]", "synthesis.reuse_every=2"),
        *(f"guidance.decoder={light}", "guidance.decoder_window=[0.6,1]"),
    ]
    text = " ".join(dry_run(load_recipe(good_recipe, [*common, *cheap]))[0].split())
    # Whole on two rows, shallow, whole on one.
    assert "1 of them twice for classifier-free guidance 2, 1 steps with the outermost blocks alone: 3 calls" in text
    assert "decoder (1 times the light one) and teacher" in text
    assert "light.safetensors: convolutions, latents enlarged 4 times" in text
