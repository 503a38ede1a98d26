"""The prior: a latent diffusion model in diffusers' Stable Diffusion format, frozen, from a folder or the hub."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import PriorRecipe

COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}

# What is fetched from the hub: one copy of the weights, safetensors only.
HUB_FILES = [
    "model_index.json",
    "README.md",
    "scheduler/*.json",
    "tokenizer/*",
    "*/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]


@dataclass
class Prior:
    """A frozen Stable-Diffusion-format model; UNet and VAE in the recipe's dtype, text encoder in float32."""

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    scheduler_config: dict[str, Any]
    """As the stock pipeline uses it: steps_offset 1, clip_sample off."""
    folder: Path
    channels: int
    """Colour channels of its images."""
    image_size: tuple[int, int]
    """Height and width of its images in pixels."""
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float
    prediction_type: str
    licence: str | None
    """From the front matter of the model card, if there is one."""

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Text embeddings float32 [n, tokens, width], padded and cut to the tokenizer's length as by diffusers."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.text_encoder.parameters()).device
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(device)
        return self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1] from latents [B, c, h, w]: clamp(D / 2 + 1 / 2), differentiable."""
        dtype = next(self.vae.parameters()).dtype
        unscaled = latents / self.scaling_factor + self.shift_factor
        image = self.vae.decode(unscaled.to(dtype), return_dict=False)[0]  # type: ignore[operator]
        return (image.float() / 2 + 0.5).clamp(0, 1)


def load_prior(recipe: PriorRecipe, device: torch.device | str) -> Prior:
    """Frozen prior on ``device``, UNet and VAE channels_last; nothing is printed.

    Raises UserError that names the path: no such folder, hub id without a commit or out of reach, a component that is
    missing, of another class, without safetensors weights, or that does not fit the others.
    """
    folder = find_prior(recipe)
    classes = _component_classes(folder)
    dtype = getattr(torch, recipe.dtype)
    unet = _load(folder, "unet", classes["unet"], dtype)
    vae = _load(folder, "vae", classes["vae"], dtype)
    text_encoder = _load(folder, "text_encoder", classes["text_encoder"], torch.float32)
    tokenizer = _load_tokenizer(folder)
    _check_fit(folder, unet, vae, text_encoder)
    unet.to(device=device, memory_format=torch.channels_last)
    vae.to(device=device, memory_format=torch.channels_last)
    text_encoder.to(device)

    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    scheduler_config = read_scheduler_config(folder)
    return Prior(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=scheduler_config,
        folder=folder,
        channels=vae.config.out_channels,
        image_size=(height * factor, width * factor),
        latent_shape=(unet.config.in_channels, height, width),
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.get("shift_factor") or 0.0,
        prediction_type=scheduler_config.get("prediction_type", "epsilon"),
        licence=recipe.licence or read_licence(folder / "README.md"),
    )


def find_prior(recipe: PriorRecipe) -> Path:
    """Folder of the prior; a hub id is fetched at its commit, or found in the hub library's cache."""
    folder = Path(recipe.path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", recipe.path):
        raise UserError(f"prior.path: {recipe.path}: no such folder; give one in diffusers' format, or a hub id")
    if not re.fullmatch(r"[0-9a-f]{40}", recipe.revision or ""):
        raise UserError(
            f"prior.revision: {recipe.path} is no folder here, and as a hub id it needs a commit of 40 hexadecimal "
            f"digits, got {recipe.revision or 'none'}: branches move, and a run must be repeatable"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    # Its retries are warnings; the progress bars of a download stay.
    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(recipe.path, revision=recipe.revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise UserError(
            f"prior.path: {recipe.path} at {recipe.revision} cannot be fetched from the hub ({_line(error)}); "
            "check id, commit, network and access, or give a folder"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def read_scheduler_config(folder: Path) -> dict[str, Any]:
    """Scheduler configuration of a prior's folder, with the two fields that the stock pipeline corrects in old ones."""
    config = _read_json(folder / "scheduler" / "scheduler_config.json")
    return config | {"steps_offset": 1, "clip_sample": False}


def read_licence(card: Path) -> str | None:
    """Licence that a model card's YAML front matter states, or None."""
    if not card.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        # A stranger's card that is not valid YAML states no licence; it is no reason to refuse the model.
        return None
    if not isinstance(front, dict):
        return None
    name = front.get("license")
    if name == "other":
        name = front.get("license_name") or name
    return None if name is None else str(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and progress bars of diffusers and transformers, and puts their settings back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _component_classes(folder: Path) -> dict[str, str]:
    """Class of each component by model_index.json, checked against what we know how to run."""
    index = _read_json(folder / "model_index.json")
    found = {}
    for component, allowed in COMPONENTS.items():
        entry = index.get(component)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name not in allowed:
            raise UserError(
                f"{folder / 'model_index.json'}: {component} is {name or 'missing'}; "
                f"a Stable Diffusion 1.x or 2.x model has {' or '.join(allowed)}"
            )
        if not (folder / component).is_dir():
            raise UserError(f"{folder / component}: missing, though model_index.json names it; complete the folder")
        found[component] = name
    return found


def _load(folder: Path, component: str, name: str, dtype: torch.dtype) -> Any:
    """One network, frozen and in eval mode, every weight read from safetensors."""
    import diffusers
    import transformers

    path = folder / component
    library, keyword = (transformers, "dtype") if component == "text_encoder" else (diffusers, "torch_dtype")
    try:
        with quiet():
            model, info = getattr(library, name).from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **{keyword: dtype}
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be loaded as {name} ({_line(error)}); it needs a config.json and .safetensors weights"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: the weights lack {len(missing)} tensors of a {name}, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    path = folder / "tokenizer"
    try:
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be loaded as CLIPTokenizer ({_line(error)})") from None
    if tokenizer.model_max_length > 10_000:
        raise UserError(f"{path / 'tokenizer_config.json'}: model_max_length is missing; set the text encoder's length")
    return tokenizer


def _check_fit(folder: Path, unet: Any, vae: Any, text_encoder: Any) -> None:
    """Raises UserError where the components do not fit together, or the UNet wants inputs that we do not give."""
    channels, latents = unet.config.in_channels, vae.config.latent_channels
    if channels != latents or unet.config.out_channels != latents:
        raise UserError(
            f"{folder / 'unet'}: takes {channels} and gives {unet.config.out_channels} channels, but the latents of "
            f"{folder / 'vae'} have {latents}; take a text-to-image model whose parts belong together"
        )
    width = text_encoder.config.hidden_size
    if unet.config.cross_attention_dim != width:
        raise UserError(
            f"{folder / 'unet'}: cross_attention_dim is {unet.config.cross_attention_dim}, but the embeddings of "
            f"{folder / 'text_encoder'} are {width} wide; take parts that belong together"
        )
    extra = [key for key in ("class_embed_type", "addition_embed_type", "time_cond_proj_dim") if unet.config.get(key)]
    if extra:
        raise UserError(f"{folder / 'unet'}: needs inputs beyond a prompt ({', '.join(extra)}); take an SD 1.x or 2.x")
    if unet.config.sample_size is None:
        raise UserError(f"{folder / 'unet' / 'config.json'}: sample_size is missing; set the latents' height and width")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: missing; a prior is a complete folder in diffusers' Stable Diffusion format")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object expected, this is {type(content).__name__}")
    return content


def _line(error: Exception) -> str:
    """First line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
