"""Fixtures shared by all tests: tiny priors in diffusers' Stable Diffusion format, made here with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))

TOKENS = 16
WIDTH = 16


def write_tokenizer(folder: Path) -> int:
    """CLIP's files with its 512 byte tokens and three merges; returns the size of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + place) for place in range(256 - len(printable))]
    merges = [("a", "n</w>"), ("o", "f</w>"), ("i", "c")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def build_prior(
    folder: Path,
    *,
    channels: int = 1,
    prediction_type: str = "epsilon",
    tiny_vae: bool = False,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """A Stable-Diffusion-format folder: 32x32 images, 8x8x4 latents, random weights, a second to make."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    vocabulary = write_tokenizer(folder / "tokenizer")
    unet: Any = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae: Any
    if tiny_vae:
        vae = diffusers.AutoencoderTiny(
            in_channels=channels,
            out_channels=channels,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
        )
    else:
        vae = diffusers.AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    config = {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
        "prediction_type": prediction_type,
        **(scheduler or {}),
    }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", config["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\nRandom weights.\n")
    return folder


@pytest.fixture(scope="session")
def prior_builder() -> Callable[..., Path]:
    """`build_prior`, for tests that need a folder of their own."""
    return build_prior


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD-1.x-like folder: epsilon, 1-channel 32x32 images, 8x8x4 latents. Shared: do not write into it."""
    return build_prior(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture(scope="session")
def tiny_prior_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD-2.x-like folder: v-prediction, 3-channel 32x32 images, DDIM configuration. Shared: do not write into it."""
    return build_prior(
        tmp_path_factory.mktemp("prior") / "tiny-v",
        channels=3,
        prediction_type="v_prediction",
        scheduler={"_class_name": "DDIMScheduler"},
    )
