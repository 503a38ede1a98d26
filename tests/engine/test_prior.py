import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import load_prior, quiet, read_licence
from diffdfkd.engine.recipe import PriorRecipe
from diffdfkd.engine.schedule import make_table
from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.philox import INITIAL_NOISE, philox_normal
from diffdfkd.kernels.predict import predict
from diffdfkd.kernels.row import named

PROMPTS = ["an icon of a coat", "a bag"]


def stock_pipeline(folder: Path) -> Any:
    with quiet():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["tiny_prior", "tiny_prior_v"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def broken(tiny_prior: Path, tmp_path: Path) -> Path:
    """A copy of the tiny prior to break."""
    return Path(shutil.copytree(tiny_prior, tmp_path / "broken"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_loaded(folder: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(folder)), "cpu")
    third_channels = folder.name == "tiny-v"
    assert prior.channels == (3 if third_channels else 1)
    assert prior.prediction_type == ("v_prediction" if third_channels else "epsilon")
    assert prior.latent_shape == (4, 8, 8)
    assert prior.image_size == (32, 32)
    assert prior.scaling_factor == pytest.approx(0.18215)
    assert prior.licence == "cc0-1.0"
    for network in (prior.unet, prior.vae, prior.text_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_our_plain_loop_is_the_stock_pipeline(folder: Path, scale: float) -> None:
    """DDIM, guidance off: latents, and the images decoded from them, of diffusers' own pipeline to 1e-4."""
    prior = load_prior(PriorRecipe(path=str(folder)), "cpu")
    pipeline = stock_pipeline(folder)
    noise = philox_normal(1, torch.arange(2), 0, INITIAL_NOISE, prior.latent_shape)
    options: dict[str, Any] = {"latents": noise.clone(), "num_inference_steps": 5, "guidance_scale": scale}
    expected = pipeline(PROMPTS, output_type="latent", height=32, width=32, **options).images
    images = pipeline(PROMPTS, output_type="pt", height=32, width=32, **options).images

    copies = 1 if scale == 1 else 2
    context = prior.embed(PROMPTS) if scale == 1 else torch.cat((prior.embed(["", ""]), prior.embed(PROMPTS)))
    table = make_table("ddim", prior.scheduler_config, 5)
    z = table.initial_scale * noise
    with torch.no_grad():
        for row, timestep in zip(table.rows, table.timesteps, strict=True):
            sample = (named(row).input_scale * z).repeat(copies, 1, 1, 1)
            output = prior.unet(sample, timestep.expand(len(sample)), encoder_hidden_states=context).sample
            prediction = predict(z, output, row, scale)
            z = advance(z, prediction.eps_hat, prediction.x0, None, row).z
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
        assert (expected - noise).abs().max() > 0.1
        torch.testing.assert_close(prior.decode(z), images, rtol=0, atol=1e-4)


def test_embeddings_are_padded_and_cut_as_in_the_stock_pipeline(tiny_prior: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(tiny_prior)), "cpu")
    prompts = ["", "a very long prompt " * 9]
    expected, _ = stock_pipeline(tiny_prior).encode_prompt(prompts, "cpu", 1, False)
    embeddings = prior.embed(prompts)
    assert embeddings.shape == (2, 16, 16) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected)


def test_decode_has_a_gradient(tiny_prior: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(tiny_prior)), "cpu")
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = prior.decode(latents)
    assert images.shape == (2, 1, 32, 32) and images.min() >= 0 and images.max() <= 1
    images.sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_tiny_autoencoder_and_half_precision(prior_builder: Callable[..., Path], tmp_path: Path) -> None:
    folder = prior_builder(tmp_path / "tiny-vae", channels=3, tiny_vae=True)
    prior = load_prior(PriorRecipe(path=str(folder), dtype="bfloat16"), "cpu")
    assert next(prior.unet.parameters()).dtype == torch.bfloat16
    images = prior.decode(torch.randn(2, *prior.latent_shape))
    assert images.shape == (2, 3, *prior.image_size) and images.dtype == torch.float32
    assert prior.embed(["a bag"]).dtype == torch.float32


def test_old_scheduler_configurations_are_corrected_as_in_the_stock_pipeline(broken: Path) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", clip_sample=True, steps_offset=0)
    with quiet():
        stock = stock_pipeline(broken).scheduler
        stock.set_timesteps(5)
    table = make_table("ddim", load_prior(PriorRecipe(path=str(broken)), "cpu").scheduler_config, 5)
    assert table.timesteps.tolist() == stock.timesteps.tolist()


def test_loading_is_quiet_and_leaves_settings_alone(tiny_prior: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_prior(PriorRecipe(path=str(tiny_prior)), "cpu").embed(["a bag"])
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("path", "revision", "words"),
    [
        ("/no/such/folder", None, r"prior\.path: /no/such/folder: no such folder"),
        ("./missing", None, r"prior\.path: \./missing: no such folder"),
        ("someone/model", None, r"prior\.revision: someone/model .* commit .* got none"),
        ("someone/model", "main", r"prior\.revision: .* got main"),
    ],
)
def test_paths_that_are_refused(path: str, revision: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_prior(PriorRecipe(path=path, revision=revision), "cpu")


def test_hub_id_is_fetched_at_its_commit(tiny_prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(tiny_prior)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load_prior(PriorRecipe(path="someone/model", revision="0" * 40), "cpu")
    assert asked == [("someone/model", "0" * 40)]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"prior\.path: someone/model at 0.* \(no connection\); check id"):
        load_prior(PriorRecipe(path="someone/model", revision="0" * 40), "cpu")


def test_missing_parts_are_named(broken: Path) -> None:
    def refuse(words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_prior(PriorRecipe(path=str(broken)), "cpu")

    (broken / "scheduler" / "scheduler_config.json").rename(broken / "config.json")
    refuse("scheduler_config.json: missing")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refuse("unet: cannot be loaded as UNet2DConditionModel")
    shutil.rmtree(broken / "vae")
    refuse("vae: missing, though model_index.json names it")
    edit(broken / "model_index.json", vae=["diffusers", "VQModel"])
    refuse("model_index.json: vae is VQModel; .* AutoencoderKL or AutoencoderTiny")
    (broken / "model_index.json").write_text("{")
    refuse("model_index.json: not a JSON file")
    (broken / "model_index.json").unlink()
    refuse("model_index.json: missing")


def test_pickled_weights_are_refused(broken: Path) -> None:
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, broken / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"vae: cannot be loaded.*safetensors"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_incomplete_weights_are_refused(broken: Path, component: str) -> None:
    from safetensors.torch import load_file, save_file

    (weights,) = (broken / component).glob("*.safetensors")
    tensors = load_file(weights)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{component}: the weights lack 1 tensors"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


def test_parts_that_do_not_fit(prior_builder: Callable[..., Path], broken: Path) -> None:
    with quiet():
        vae: Any = diffusers.AutoencoderTiny(
            in_channels=1,
            out_channels=1,
            encoder_block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            num_encoder_blocks=(1,),
            num_decoder_blocks=(1,),
            latent_channels=3,
        )
        vae.save_pretrained(broken / "vae")
    edit(broken / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(UserError, match=r"unet: takes 4 and gives 4 channels, but the latents of .*vae have 3"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


def test_embeddings_of_another_width(broken: Path) -> None:
    import transformers

    with quiet():
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=600,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=16,
            )
        ).save_pretrained(broken / "text_encoder")
    with pytest.raises(UserError, match=r"unet: cross_attention_dim is 16, but the embeddings of .* are 8 wide"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: openrail-x\n---\n", "openrail-x"),
        ("no front matter", None),
        ("---\n: [\n---\n", None),
    ],
)
def test_licence_of_the_model_card(card: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path / "README.md") == expected
    assert read_licence(tmp_path / "missing.md") is None
