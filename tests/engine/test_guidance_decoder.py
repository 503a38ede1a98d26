"""The light decoder: its file, what it fits, and the sizes that it decodes to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stand_in_stages import open_prior

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.guidance_decoder import (
    GuidanceDecoder,
    Shape,
    decoder_scale,
    load_guidance_decoder,
    vae_digest,
    write_guidance_decoder,
)
from diffdfkd.engine.prior import Prior


def written(path: Path, prior: Prior, **fields: Any) -> Path:
    """A file of an untrained decoder that fits the prior, but for the fields."""
    shape = Shape(**{"form": "convolutions", "latent_channels": 4, "channels": 1, "scale": 4, "width": 4, **fields})
    torch.manual_seed(0)
    write_guidance_decoder(GuidanceDecoder(shape, vae_digest(prior)), path, {"images": 3})
    return path


@pytest.fixture(scope="module")
def prior(tiny_prior: Path) -> Prior:
    return open_prior(tiny_prior)


@pytest.mark.parametrize("form", ["convolutions", "linear"])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_images_are_as_large_as_the_scale_says(form: Any, scale: int) -> None:
    decoder = GuidanceDecoder(Shape(form, 4, 3, scale, 8), "")
    images = decoder(5 * torch.randn(2, 4, 6, 8))
    assert images.shape == (2, 3, 6 * scale, 8 * scale)
    assert images.min() >= 0 and images.max() <= 1
    assert not any(isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm) for module in decoder.modules())


def test_linear_form_is_linear_before_the_clamp() -> None:
    decoder = GuidanceDecoder(Shape("linear", 4, 1, 2, 8), "")
    a, b = torch.randn(2, 1, 4, 5, 5)
    zero = decoder.brightness(torch.zeros_like(a))
    whole, parts = decoder.brightness(2 * a - b), 2 * decoder.brightness(a) - decoder.brightness(b)
    torch.testing.assert_close(whole - zero, parts - zero, atol=1e-5, rtol=1e-5)


def test_scale_reaches_the_teacher_and_no_further() -> None:
    # (latent side, VAE's factor, teacher's size)
    assert [decoder_scale(*case) for case in ((8, 4, 28), (64, 8, 32), (64, 8, 224), (64, 8, 65), (8, 4, 224))] == [
        *(4, 1, 4, 2, 4)
    ]


def test_file_comes_back_as_it_was(tmp_path: Path, prior: Prior) -> None:
    path = written(tmp_path / "light.safetensors", prior)
    decoder = load_guidance_decoder(str(path), prior)
    latents = torch.randn(2, 4, 8, 8)
    torch.manual_seed(0)
    first = GuidanceDecoder(decoder.shape, "")
    assert torch.equal(decoder(latents), first(latents))
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert (header["form"], header["scale"], header["images"], header["vae"]) == (
        *("convolutions", "4", "3"),
        vae_digest(prior),
    )
    again = written(tmp_path / "again.safetensors", prior)
    assert again.read_bytes() == path.read_bytes()


def test_digest_knows_the_vae_and_not_its_dtype(
    tiny_prior: Path, prior_builder: Callable[..., Path], tmp_path: Path
) -> None:
    digest = vae_digest(open_prior(tiny_prior))
    assert digest == vae_digest(open_prior(tiny_prior, "bfloat16"))
    copy = prior_builder(tmp_path / "copy")
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    assert vae_digest(open_prior(copy)) == digest
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file)
    assert vae_digest(open_prior(copy)) != digest


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latent_channels": 8}, "has 8 latent channels, the prior 4"),
        ({"channels": 3}, "has 3 colour channels, the prior 1"),
        ({"scale": 8}, "enlarges 8 times, the prior's VAE 4 times"),
    ],
)
def test_decoder_of_another_prior_is_refused(tmp_path: Path, prior: Prior, fields: dict[str, int], words: str) -> None:
    path = written(tmp_path / "light.safetensors", prior, **fields)
    with pytest.raises(UserError, match=words) as error:
        load_guidance_decoder(str(path), prior)
    assert str(error.value).startswith("guidance.decoder: ") and "diffdfkd decoder" in str(error.value)


def test_decoder_of_another_vae_is_refused(tmp_path: Path, prior: Prior, tiny_sd1: Path) -> None:
    path = tmp_path / "light.safetensors"
    write_guidance_decoder(GuidanceDecoder(Shape("linear", 4, 1, 4, 4), "0" * 64), path, {})
    with pytest.raises(UserError, match="distilled from another VAE"):
        load_guidance_decoder(str(path), prior)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "cubic"}, "does not describe"),
        ({"width": "5"}, "does not describe"),
        ({"scale": "3"}, "does not describe"),
        ({"vae": None}, "lacks vae"),
        ({"weights_sha256": "0" * 64}, "not those that were written"),
    ],
)
def test_changed_header_is_refused(tmp_path: Path, prior: Prior, change: dict[str, Any], words: str) -> None:
    path = written(tmp_path / "light.safetensors", prior)
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **change}
    save_file(load_file(path), path, {key: value for key, value in header.items() if value is not None})
    with pytest.raises(UserError, match=words):
        load_guidance_decoder(str(path), prior)


def test_other_files_are_refused(tmp_path: Path, prior: Prior) -> None:
    for name, content, words in (
        ("weights.safetensors", None, "is no guidance decoder"),
        ("text.safetensors", json.dumps({}), "not a safetensors file"),
    ):
        path = tmp_path / name
        if content is None:
            save_file({"weight": torch.zeros(2)}, path)
        else:
            path.write_text(content)
        with pytest.raises(UserError, match=words):
            load_guidance_decoder(str(path), prior)
    with pytest.raises(UserError, match="no such file"):
        load_guidance_decoder(str(tmp_path / "nowhere.safetensors"), prior)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, prior: Prior) -> None:
    decoder = GuidanceDecoder(Shape("linear", 4, 1, 4, 4), vae_digest(prior))
    with torch.no_grad():
        next(decoder.parameters()).view(-1)[0] = torch.nan
    write_guidance_decoder(decoder, tmp_path / "light.safetensors", {})
    with pytest.raises(UserError, match="NaN or infinite"):
        load_guidance_decoder(str(tmp_path / "light.safetensors"), prior)
