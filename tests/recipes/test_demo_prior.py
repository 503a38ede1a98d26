"""The committed priors are ordinary Stable Diffusion folders."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffdfkd.recipes import pretrain_prior, render_fonts, render_icons

ASSETS = Path(pretrain_prior.__file__).resolve().parent / "assets"
FOLDER = ASSETS / "fashion" / "prior"
ATTRIBUTION = {"fashion": "ICONS.md", "digits": "FONTS.md"}


@pytest.mark.parametrize(("recipe", "prompt"), [("fashion", "an icon of a sneaker"), ("digits", "a digit seven")])
def test_the_stock_pipeline_generates(recipe: str, prompt: str) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / recipe / "prior")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt,
        num_images_per_prompt=4,
        num_inference_steps=6,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (4, 32, 32, 1)
    assert np.isfinite(images).all()
    assert images.std(axis=(1, 2, 3)).min() > 0.05, "an image is flat"
    assert np.abs(images[0] - images[1]).mean() > 0.02, "different noise gives the same image"


@pytest.mark.parametrize("recipe", ATTRIBUTION)
def test_it_is_small_and_has_a_card(recipe: str) -> None:
    folder = ASSETS / recipe / "prior"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert ATTRIBUTION[recipe] in card


def test_the_digits_card_the_attribution_and_the_docs_tell_of_the_same_fonts() -> None:
    folder, fonts = ASSETS / "digits", len(render_fonts.load_glyphs())
    assert f"**Data.** {render_fonts.IMAGES:,} images" in (folder / "prior" / "README.md").read_text(encoding="utf-8")
    for file in (folder / "FONTS.md", ASSETS.parents[1] / "docs" / "demo.md"):
        text = file.read_text(encoding="utf-8")
        assert f"{render_fonts.IMAGES:,}" in text
        assert f"{fonts} font families" in text


def test_its_card_the_attribution_and_the_docs_tell_of_the_same_icons() -> None:
    glyphs = render_icons.load_glyphs()
    images = len(render_icons.plan_images(glyphs, render_icons.VARIANTS, seed=0))
    assert f"**Data.** {images:,} images" in (FOLDER / "README.md").read_text(encoding="utf-8")
    for file in (FOLDER.parent / "ICONS.md", FOLDER.parents[3] / "docs" / "demo.md"):
        text = file.read_text(encoding="utf-8")
        assert f"{images:,}" in text
        assert f"{len(glyphs.words)} icons" in text
