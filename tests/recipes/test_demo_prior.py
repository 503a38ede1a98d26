"""The committed demo prior is an ordinary Stable Diffusion folder."""

from pathlib import Path

import numpy as np
import torch

from diffdfkd.recipes import pretrain_prior

FOLDER = Path(pretrain_prior.__file__).resolve().parent / "assets" / "fashion" / "prior"


def test_the_stock_pipeline_generates_a_sneaker() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "an icon of a sneaker",
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


def test_it_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "ICONS.md" in card
