"""Fixtures shared by all tests: tiny priors in diffusers' Stable Diffusion format, made here with random weights."""

import atexit
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that run beside each other, and the commands that they start, would wait for each other's threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, torch.get_num_threads()))))


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports triton: its kernels run on CPU tensors, but for ``-m gpu``, where they are compiled."""
    # Engines that tests build are nobody's, and those that a user has built are none of the tests'.
    cache = tempfile.mkdtemp(prefix="diffdfkd-engines-")
    os.environ["DIFFDFKD_CACHE"] = cache
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    if config.getoption("markexpr", "").strip() != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


TOKENS = 16
WIDTH = 16

# As published: 77 tokens, cross-attention at two resolutions, a VAE of four levels, and each family's own fields.
SD1: dict[str, Any] = {
    "channels": 3,
    "tokens": 77,
    "vae_levels": 4,
    "unet": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
SD2: dict[str, Any] = {
    **SD1,
    "prediction_type": "v_prediction",
    "pad_token": "!",
    "unet": {**SD1["unet"], "attention_head_dim": [1, 2, 2], "use_linear_projection": True, "upcast_attention": True},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "hidden_act": "gelu"},
    "scheduler": {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", "trained_betas": None},
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TURBO = {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
    "use_karras_sigmas": False,
}


def write_tokenizer(folder: Path, tokens: int = TOKENS, pad_token: str = "<|endoftext|>") -> int:
    """CLIP's files with its 512 byte tokens and three merges; returns the size of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + place) for place in range(256 - len(printable))]
    merges = [("a", "n</w>"), ("o", "f</w>"), ("i", "c")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokens, "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)


def build_prior(
    folder: Path,
    *,
    channels: int = 1,
    prediction_type: str = "epsilon",
    tiny_vae: bool = False,
    vae_levels: int = 3,
    tokens: int = TOKENS,
    pad_token: str = "<|endoftext|>",
    unet: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    variant: str | None = None,
) -> Path:
    """A Stable-Diffusion-format folder with random weights, a second to make: 8x8x4 latents, 32x32 images.

    Each level of the VAE above three doubles the images. ``unet``, ``text_encoder`` and ``scheduler`` are fields laid
    over their configurations.
    """
    import diffusers
    import transformers

    torch.manual_seed(0)
    vocabulary = write_tokenizer(folder / "tokenizer", tokens, pad_token)
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokens,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        **(text_encoder or {}),
    }
    network: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": text["hidden_size"],
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **(unet or {}),
    }
    vae: Any
    if tiny_vae:
        vae = diffusers.AutoencoderTiny(
            in_channels=channels,
            out_channels=channels,
            encoder_block_out_channels=(8,) * vae_levels,
            decoder_block_out_channels=(8,) * vae_levels,
            num_encoder_blocks=(1,) * vae_levels,
            num_decoder_blocks=(1,) * vae_levels,
            latent_channels=4,
        )
    else:
        vae = diffusers.AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,) * vae_levels,
            down_block_types=("DownEncoderBlock2D",) * vae_levels,
            up_block_types=("UpDecoderBlock2D",) * vae_levels,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8 * 2 ** (vae_levels - 1),
        )
    denoiser: Any = diffusers.UNet2DConditionModel(**network)
    denoiser.save_pretrained(folder / "unet", variant=variant)
    vae.save_pretrained(folder / "vae", variant=variant)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    model.save_pretrained(folder / "text_encoder", variant=variant)
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


LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Layers that LCM-LoRA trains (diffusers' train_lcm_distill_lora_sd_wds.py), by the end of their names."""


def write_lora(
    path: Path,
    prior: Path,
    *,
    style: Literal["kohya", "diffusers", "peft"] = "kohya",
    rank: int = 2,
    alpha: float = 1.0,
    size: float = 0.1,
    text_encoder: bool = False,
    seed: int = 0,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A random LCM-LoRA for the folder's UNet as a .safetensors file: {"unet.<module>": (A, B)} of its layers.

    ``kohya`` is the format of latent-consistency/lcm-lora-sdv1-5, ``peft`` that of today's diffusers, ``diffusers``
    that of its first LoRA scripts. With ``text_encoder`` CLIP's attention takes part, as in a style LoRA.
    """
    import diffusers
    import transformers
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    networks: dict[str, tuple[Any, tuple[str, ...]]] = {
        "unet": (diffusers.UNet2DConditionModel.from_pretrained(prior / "unet"), LCM_TARGETS)
    }
    if text_encoder:
        clip = transformers.CLIPTextModel.from_pretrained(prior / "text_encoder")
        networks["text_encoder"] = (clip, ("q_proj", "k_proj", "v_proj", "out_proj"))
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for component, (network, targets) in networks.items():
        for name, layer in network.named_modules():
            if not name.endswith(targets) or not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                continue
            rows, columns, *kernel = layer.weight.shape
            down = size * torch.randn((rank, columns, *kernel), generator=generator)
            up = size * torch.randn((rows, rank, *[1] * len(kernel)), generator=generator)
            # The text encoder's modules may lack CLIP's own level, which published files always name.
            if component == "text_encoder" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            updates[f"{component}.{name}"] = (down, up)
            if style == "kohya":
                prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + name.replace(".", "_")
                tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
                tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
            elif style == "peft":
                tensors |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
            else:
                prefix = f"{component}.{name}." + ("lora" if component == "unet" else "lora_linear_layer")
                for end in ("to_q", "to_k", "to_v", "to_out.0"):
                    # The attention's processor held its updates.
                    early = f".processor.{end.removesuffix('.0')}_lora"
                    prefix = prefix.replace(f".{end}.lora", early)
                tensors |= {f"{prefix}.down.weight": down, f"{prefix}.up.weight": up}
    metadata = {"format": "pt"}
    if style == "peft":
        content: dict[str, Any] = {}
        for component, (_, targets) in networks.items():
            config = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
            content |= {f"{component}.{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(content)
    save_file(tensors, path, metadata=metadata)
    return updates


@pytest.fixture(scope="session")
def prior_builder() -> Callable[..., Path]:
    """`build_prior`, for tests that need a folder of their own."""
    return build_prior


@pytest.fixture(scope="session")
def prior_families() -> dict[str, dict[str, Any]]:
    """Options of `build_prior` by family: sd1, sd2, sd2_zero_snr, turbo (SD-2.1's networks, epsilon, Euler)."""
    zero_snr = {**SD2, "scheduler": {**SD2["scheduler"], **ZERO_SNR}}
    turbo = {**SD2, "prediction_type": "epsilon", "scheduler": TURBO}
    return {"sd1": SD1, "sd2": SD2, "sd2_zero_snr": zero_snr, "turbo": turbo}


@pytest.fixture(scope="session")
def lora_writer() -> Callable[..., dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """`write_lora`, for tests that need a file of their own."""
    return write_lora


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


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder as SD 1.5's, small: epsilon, PNDM, 64x64 colour images, 8x8x4 latents. Shared: do not write into it."""
    return build_prior(tmp_path_factory.mktemp("prior") / "sd1", **SD1)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder as SD 2.1's, small: v-prediction, DDIM, linear projections. Shared: do not write into it."""
    return build_prior(tmp_path_factory.mktemp("prior") / "sd2", **SD2)


@pytest.fixture(scope="session")
def tiny_turbo(tmp_path_factory: pytest.TempPathFactory, prior_families: dict[str, dict[str, Any]]) -> Path:
    """Folder as SD-Turbo's, small: SD 2.1's networks, epsilon, Euler, trailing. Shared: do not write into it."""
    return build_prior(tmp_path_factory.mktemp("prior") / "turbo", **prior_families["turbo"])


@pytest.fixture(scope="session")
def tiny_lcm_lora(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: Path) -> Path:
    """An LCM-LoRA for `tiny_sd1` in the published key format, alpha 1 at rank 2. Shared: do not write into it."""
    path = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    write_lora(path, tiny_sd1)
    return path


MEMORY = resource.getrlimit(resource.RLIMIT_DATA)


@pytest.fixture(autouse=True)
def memory_limit() -> Iterator[None]:
    """A run that was called in this process has bounded it, and other tests map more than the machine has."""
    yield
    resource.setrlimit(resource.RLIMIT_DATA, MEMORY)
