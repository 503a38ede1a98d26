"""The prior: a latent diffusion model in diffusers' Stable Diffusion format, frozen, from a folder or the hub."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.guidance_decoder import GuidanceDecoder
from diffdfkd.engine.lora import fuse_loras
from diffdfkd.engine.prior_files import (
    component_classes,
    find_prior,
    find_weights,
    first_line,
    read_json,
    read_licence,
    read_scheduler_config,
    refuse_pointer,
)
from diffdfkd.engine.recipe import PriorRecipe
from diffdfkd.kernels.launch import at_least_float32

log = logging.getLogger(__name__)


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
    guidance_width: int | None = None
    """Of a UNet that is told the guidance scale (a distilled latent consistency model): width of its embedding."""
    guidance_decoder: GuidanceDecoder | None = None
    """The light decoder that the recipe's guidance goes through, where it names one."""

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
        """Images [B, C, H, W] in [0, 1] from latents [B, c, h, w]: clamp(D / 2 + 1 / 2), differentiable.

        float32, or wider where the VAE is.
        """
        return self.brightness(latents).clamp(0, 1)

    def brightness(self, latents: Tensor) -> Tensor:
        """The same before it is clamped: D / 2 + 1 / 2."""
        dtype = next(self.vae.parameters()).dtype
        unscaled = latents / self.scaling_factor + self.shift_factor
        image = self.vae.decode(unscaled.to(dtype), return_dict=False)[0]  # type: ignore[operator]
        return at_least_float32(image) / 2 + 0.5


def load_prior(recipe: PriorRecipe, device: torch.device | str) -> Prior:
    """Frozen prior on ``device`` with its LoRAs fused, UNet and VAE channels_last; nothing is printed.

    Raises UserError that names the path: no such folder, hub id without a commit or out of reach, a component that is
    missing, of another class, without whole safetensors weights, not finite, or that does not fit the others.
    """
    folder = find_prior(recipe)
    classes = component_classes(folder)
    scheduler_config = read_scheduler_config(folder)
    dtype = getattr(torch, recipe.dtype)
    # Updates are added in float32, and their sum is rounded once.
    unet = _load(folder, "unet", classes["unet"], torch.float32 if recipe.loras else dtype)
    vae = _load(folder, "vae", classes["vae"], dtype)
    text_encoder = _load(folder, "text_encoder", classes["text_encoder"], torch.float32)
    tokenizer = load_tokenizer(folder)
    _check_fit(folder, unet, vae, text_encoder, tokenizer)
    fuse_loras(recipe.loras, unet, text_encoder)
    if recipe.loras:
        with quiet():
            unet.to(dtype)
    unet.to(device=device, memory_format=torch.channels_last)
    vae.to(device=device, memory_format=torch.channels_last)
    text_encoder.to(device)
    for component, network in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        _check_finite(folder / component, network)

    if recipe.revision is not None and Path(recipe.path).is_dir():
        log.warning("prior.revision: %s is not looked at, since %s is a folder here", recipe.revision, recipe.path)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        log.warning(
            "%s: sample_size is %d x %d, and the prior's images are squeezed into the teacher's squares",
            folder / "unet" / "config.json",
            height,
            width,
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
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
        guidance_width=unet.config.time_cond_proj_dim,
    )


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


def _load(folder: Path, component: str, name: str, dtype: torch.dtype) -> Any:
    """One network, frozen and in eval mode, every weight read from safetensors."""
    import diffusers
    import transformers

    path = folder / component
    variant = find_weights(folder, component)
    if variant is not None:
        log.info("%s: only %s weights are there, so these are read", path, variant)
    library, keyword = (transformers, "dtype") if component == "text_encoder" else (diffusers, "torch_dtype")
    try:
        with quiet():
            model, info = getattr(library, name).from_pretrained(
                path,
                use_safetensors=True,
                local_files_only=True,
                variant=variant,
                output_loading_info=True,
                **{keyword: dtype},
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be loaded as {name} ({first_line(error)}); config.json and weights must belong together"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{path}: the weights lack {len(missing)} tensors of a {name}, such as {missing[0]}; take config.json and "
            "weights that belong together"
        )
    if info["mismatched_keys"]:
        key, *shapes = sorted(info["mismatched_keys"])[0]
        found, wanted = ([*shape] for shape in shapes)
        raise UserError(
            f"{path}: {len(info['mismatched_keys'])} tensors are of another shape than config.json says, such as "
            f"{key}, {found} for {wanted}; take parts that belong together"
        )
    # Buffers that older versions of transformers stored are recomputed.
    unused = sorted(key for key in info["unexpected_keys"] if not key.endswith("position_ids"))
    if unused:
        log.warning(
            "%s: %d tensors are no part of its %s and are left aside, such as %s", path, len(unused), name, unused[0]
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a prior's folder; UserError where its files are missing or damaged."""
    from transformers import CLIPTokenizer

    path = folder / "tokenizer"
    for file in sorted((*path.glob("*.json"), *path.glob("*.txt"))):
        refuse_pointer(file)
    if not (path / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (path / name).is_file():
                raise UserError(f"{path / name}: missing; complete the folder, for example by downloading it again")
        read_json(path / "vocab.json")
    try:
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be loaded as CLIPTokenizer ({first_line(error)}); copy or download its files again"
        ) from None
    config = path / "tokenizer_config.json"
    if tokenizer.model_max_length > 10_000:
        raise UserError(f"{config}: model_max_length is missing; set the text encoder's length")
    if tokenizer.model_max_length < 3:
        raise UserError(
            f"{config}: model_max_length is {tokenizer.model_max_length}, too few for a word between begin and end; "
            "set the text encoder's length (Stable Diffusion: 77)"
        )
    return tokenizer


def _check_fit(folder: Path, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Raises UserError where the components do not fit together, or the UNet wants inputs that we do not give."""
    channels, latents = unet.config.in_channels, vae.config.latent_channels
    if channels != latents or unet.config.out_channels != latents:
        raise UserError(
            f"{folder / 'unet'}: takes {channels} and gives {unet.config.out_channels} channels, but the latents of "
            f"{folder / 'vae'} have {latents}; take a text-to-image model whose parts belong together"
        )
    if vae.config.out_channels not in (1, 3):
        raise UserError(
            f"{folder / 'vae'}: gives images of {vae.config.out_channels} channels; grey (1) and colour (3) are "
            "converted into each other for the teacher, nothing else is"
        )
    width = text_encoder.config.hidden_size
    if unet.config.cross_attention_dim != width:
        raise UserError(
            f"{folder / 'unet'}: cross_attention_dim is {unet.config.cross_attention_dim}, but the embeddings of "
            f"{folder / 'text_encoder'} are {width} wide; take parts that belong together"
        )
    longest = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > longest:
        raise UserError(
            f"{folder / 'tokenizer' / 'tokenizer_config.json'}: model_max_length is {tokenizer.model_max_length}, but "
            f"the text encoder has {longest} positions; set it to {longest}, or take parts that belong together"
        )
    highest, known = max(tokenizer.get_vocab().values()), text_encoder.config.vocab_size
    if highest >= known:
        raise UserError(
            f"{folder / 'tokenizer'}: its tokens go up to number {highest}, but {folder / 'text_encoder'} knows "
            f"{known}; take parts that belong together"
        )
    extra = [key for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim") if unet.config.get(key)]
    if extra:
        raise UserError(f"{folder / 'unet'}: needs inputs beyond a prompt ({', '.join(extra)}); take an SD 1.x or 2.x")
    if unet.config.sample_size is None:
        raise UserError(f"{folder / 'unet' / 'config.json'}: sample_size is missing; set the latents' height and width")
    sides = unet.config.sample_size
    sides = [*sides] if isinstance(sides, list | tuple) else [sides, sides]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(
            f"{folder / 'unet' / 'config.json'}: sample_size is {unet.config.sample_size}; set the latents' height and "
            "width, one positive whole number or two"
        )
    scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
    if not _finite(scale) or scale <= 0:
        raise UserError(
            f"{folder / 'vae' / 'config.json'}: scaling_factor is {scale}; a positive number is needed, as published "
            "with the VAE (0.18215 in Stable Diffusion 1.x and 2.x)"
        )
    if shift is not None and not _finite(shift):
        raise UserError(f"{folder / 'vae' / 'config.json'}: shift_factor is {shift}; a finite number or null is needed")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_finite(path: Path, network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{path}: {name} has NaN or infinite values in {str(tensor.dtype).removeprefix('torch.')}; download "
                "the weights again, or take prior.dtype=float32 if another one was asked for"
            )
