"""A light decoder in the place of the VAE's while guidance looks at an image: a few convolutions, one small file.

It is distilled from the VAE on the prior's own samples (recipes/distill_decoder.py), in the manner of TAESD
(madebyollin/taesd): convolutions without normalisation. Final images are always decoded by the VAE.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffdfkd.engine.checkpoint import state_digest
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior_files import read_json, refuse_pointer, weight_files

if TYPE_CHECKING:
    from diffdfkd.engine.prior import Prior

Form = Literal["convolutions", "linear"]
FORMS: tuple[Form, ...] = ("convolutions", "linear")
MAKING = "make one with: diffdfkd decoder RECIPE --output FILE.safetensors"
LEAST_WIDTH = 4
"""Channels at the image's own resolution, however narrow the network is."""


@dataclass(frozen=True)
class Shape:
    """All that it takes to build a light decoder; the header of its file."""

    form: Form
    latent_channels: int
    channels: int
    """Colour channels of the image."""
    scale: int
    """Of the latent's height and width to the image's, a power of two."""
    width: int
    """Channels at the latent's resolution, halved at each doubling; of no meaning where it is linear."""


class GuidanceDecoder(nn.Module):
    """Latents [B, c, h, w] to images [B, C, scale h, scale w] in [0, 1]; autograd can cross it."""

    def __init__(self, shape: Shape, vae: str) -> None:
        """``vae``: `vae_digest` of the prior whose VAE this stands in for."""
        super().__init__()
        self.shape, self.vae = shape, vae
        make = {"convolutions": _convolutions, "linear": _linear}[shape.form]
        self.layers = nn.Sequential(*make(shape))

    def forward(self, latents: Tensor) -> Tensor:
        return self.brightness(latents).clamp(0, 1)

    def brightness(self, latents: Tensor) -> Tensor:
        """The image before it is clamped, as `Prior.brightness`."""
        image: Tensor = self.layers(latents)
        return image / 2 + 0.5

    def settings(self) -> dict[str, Any]:
        """What it is besides its weights."""
        return asdict(self.shape)


def _convolutions(shape: Shape) -> list[nn.Module]:
    width = shape.width
    layers: list[nn.Module] = [nn.Conv2d(shape.latent_channels, width, 3, padding=1), nn.SiLU(), _Residual(width)]
    for _ in range(shape.scale.bit_length() - 1):
        narrower = max(width // 2, LEAST_WIDTH)
        layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, narrower, 3, padding=1), nn.SiLU()]
        width = narrower
    return [*layers, nn.Conv2d(width, shape.channels, 3, padding=1)]


def _linear(shape: Shape) -> list[nn.Module]:
    outputs = shape.channels * shape.scale**2
    return [nn.Conv2d(shape.latent_channels, outputs, 3, padding=1), nn.PixelShuffle(shape.scale)]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x + self.layers(x))


def decoder_scale(latent: int, factor: int, size: int) -> int:
    """The smallest power of two from latents of side ``latent`` to a teacher's ``size``; at most the VAE's factor."""
    scale = 1
    while scale < factor and latent * scale < size:
        scale *= 2
    return scale


def vae_digest(prior: "Prior") -> str:
    """SHA-256 of the prior's VAE as it lies in its folder, whatever ``prior.dtype`` it is loaded in."""
    from safetensors import safe_open

    sha256 = hashlib.sha256(f"{prior.scaling_factor} {prior.shift_factor}\n".encode())
    config = read_json(prior.folder / "vae" / "config.json")
    lasting = {key: value for key, value in config.items() if not key.startswith("_")}
    sha256.update(json.dumps(lasting, sort_keys=True).encode())
    places: dict[str, Path] = {}
    for path in weight_files(prior.folder, "vae"):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for name, path in sorted(places.items()):
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name).contiguous()
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def write_guidance_decoder(decoder: GuidanceDecoder, path: Path, facts: dict[str, Any]) -> None:
    """Weights and, in the header, shape, VAE and ``facts`` of its making; equal decoders give equal bytes."""
    from diffdfkd.engine.shards import write_atomic
    from diffdfkd.engine.weights import stable_safetensors

    state = decoder.state_dict()
    header = {**decoder.settings(), "vae": decoder.vae, "weights_sha256": state_digest(state), **facts}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    write_atomic(path, stable_safetensors(state, texts))


def load_guidance_decoder(path: str, prior: "Prior") -> GuidanceDecoder:
    """The decoder of a file that ``diffdfkd decoder`` wrote, frozen, on the prior's device.

    Raises UserError that names the field for another file and for a decoder that does not fit this prior.
    """
    field = "guidance.decoder"
    decoder = read_guidance_decoder(Path(path))
    shape, (height, _) = decoder.shape, prior.latent_shape[1:]
    factor = prior.image_size[0] // height
    for what, theirs, ours in (
        ("latent channels", shape.latent_channels, prior.latent_shape[0]),
        ("colour channels", shape.channels, prior.channels),
    ):
        if theirs != ours:
            raise UserError(f"{field}: {path} has {theirs} {what}, the prior {ours}; {MAKING}")
    if shape.scale > factor:
        raise UserError(f"{field}: {path} enlarges {shape.scale} times, the prior's VAE {factor} times; {MAKING}")
    if decoder.vae != vae_digest(prior):
        raise UserError(f"{field}: {path} was distilled from another VAE than that in {prior.folder / 'vae'}; {MAKING}")
    device = next(prior.vae.parameters()).device
    return decoder.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload, no-any-return]


def read_guidance_decoder(file: Path) -> GuidanceDecoder:
    """The decoder of a file, on the CPU; UserError that names the field for what is none."""
    from safetensors import SafetensorError, safe_open

    what = f"guidance.decoder: {file}"
    if not file.is_file():
        raise UserError(f"{what}: no such file; {MAKING}, or give 'full'")
    refuse_pointer(file)
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what}: not a safetensors file, or cut short ({error}); {MAKING}") from None
    wanted = [field.name for field in fields(Shape)]
    if missing := [name for name in (*wanted, "vae", "weights_sha256") if name not in header]:
        raise UserError(f"{what}: is no guidance decoder: its header lacks {', '.join(missing)}; {MAKING}")
    try:
        numbers = {name: int(header[name]) for name in wanted if name != "form"}
        form = next(form for form in FORMS if form == header["form"])
        shape = Shape(form=form, **numbers)
        if min(numbers.values()) < 1 or shape.scale & (shape.scale - 1):
            raise ValueError
        decoder = GuidanceDecoder(shape, header["vae"])
        decoder.load_state_dict(state)
    except (ValueError, StopIteration, RuntimeError):
        raise UserError(f"{what}: its header does not describe its weights; {MAKING}") from None
    if state_digest(state) != header["weights_sha256"]:
        raise UserError(f"{what}: its weights are not those that were written; take another copy of the file")
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise UserError(f"{what}: has NaN or infinite weights; {MAKING}")
    return decoder
