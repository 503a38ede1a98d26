import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from diffdfkd.benchmarks.full_sd15 import LIMIT, TEXT_ENCODER, UNET, UNET_PARAMETERS, VAE, ByteTokenizer
from diffdfkd.engine.memory import machine_memory


def test_configurations_are_those_of_stable_diffusion() -> None:
    """By their published numbers of parameters: UNet 860 M, VAE 84 M, CLIP ViT-L/14's text encoder 123 M."""
    import diffusers
    import transformers

    with torch.device("meta"):
        networks: list[Any] = [
            diffusers.UNet2DConditionModel(**UNET),
            diffusers.AutoencoderKL(**VAE),
            transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER)),
        ]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert sizes == [UNET_PARAMETERS, 83_653_863, 123_060_480]


def test_every_prompt_has_77_tokens() -> None:
    tokens = ByteTokenizer()(["", "an image of a coat", "long " * 50]).input_ids
    assert tokens.shape == (3, 77)
    assert tokens[:, 0].tolist() == [49406] * 3 and (tokens < TEXT_ENCODER["vocab_size"]).all()
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.slow
@pytest.mark.skipif((machine_memory() or LIMIT) < 12 * 2**30, reason="the step takes 11 GiB of memory")
def test_a_guided_step_at_512_pixels_fits_into_16_gib() -> None:
    """In a process of its own, as `python -m diffdfkd.benchmarks.full_sd15` measures it: minutes on two cores."""
    done = subprocess.run(
        [sys.executable, "-m", "diffdfkd.benchmarks.full_sd15"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["finite"] and result["losses"][2] > 0
    # The UNet's weights alone are 3.2 GiB: a figure below them would not be of this process.
    assert 3.2 < result["peak_gib"] < 16
