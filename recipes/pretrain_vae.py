"""The prior's autoencoder: a small AutoencoderKL that divides the side by 4, and the latents of a data set under it."""

import contextlib
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.pretraining import Outcome, Plan, pretrain

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LATENT_CHANNELS = 4
KL_WEIGHT = (
    1e-3  # keeps the latents bounded and smooth, so that a guidance gradient through the decoder means something
)
EDGE_WEIGHT = 0.5  # L1 alone blurs seams and outlines; the differences of neighbouring pixels bring them back


def make_vae(in_channels: int, sample_size: int, channels: tuple[int, int, int]) -> "AutoencoderKL":
    """[N, C, S, S] in [-1, 1] <-> [N, 4, S/4, S/4]. The first width costs most: it is paid at full resolution at each
    guided step; there is no attention for the same reason."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=gcd(8, *channels),
        sample_size=sample_size,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def train_vae(vae: "AutoencoderKL", images: Tensor, batch_size: int, precision: torch.dtype, plan: Plan) -> Outcome:
    """L1 + edges + a little KL on `images` (uint8 [N, C, S, S]); sets `scaling_factor` to 1/std of the latents."""
    device = next(vae.parameters()).device

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        target = to_signed(images[pick]).to(device, memory_format=torch.channels_last)
        with autocast(device, precision):
            posterior = vae.encode(target).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()  # [B, 4, S/4, S/4]
            noise = torch.randn(mean.shape, generator=generator).to(device)
            output = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).sample.float()
        pixels = (output - target).abs().mean()
        difference = output - target
        edges = (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()) / 2
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = pixels + EDGE_WEIGHT * edges + KL_WEIGHT * divergence
        return {"loss": loss, "l1": pixels, "edges": edges, "kl": divergence}

    outcome = pretrain(vae, loss_of, plan)
    fit_scale(vae, images, precision)
    return outcome


def fit_scale(vae: "AutoencoderKL", images: Tensor, precision: torch.dtype) -> None:
    """Set `scaling_factor` to 1/std of the latents of `images` (uint8 [N, C, S, S])."""
    mean, deviation = encode(vae, images[: 4096 * 4], precision)
    latents_variance = mean.var() + deviation.square().mean()
    vae.register_to_config(scaling_factor=round(float(latents_variance.rsqrt()), 5))


def load_vae(folder: Path, images: Tensor) -> "AutoencoderKL":
    """The autoencoder of a prior's folder, for images of the same kind; UserError where there is none that fits."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--vae: {folder} holds no autoencoder ({error}); give a folder that pretrain_prior wrote"
        ) from None
    found = (vae.config["in_channels"], vae.config["latent_channels"], len(vae.config["block_out_channels"]))
    if found != (images.shape[1], LATENT_CHANNELS, 3):
        raise UserError(
            f"--vae: {folder} takes {found[0]} channel(s) to {found[1]} over {found[2]} levels, the images need "
            f"{images.shape[1]} to {LATENT_CHANNELS} over 3; give another, or leave it out to train one"
        )
    return vae.eval()


@torch.no_grad()
def encode(
    vae: "AutoencoderKL", images: Tensor, precision: torch.dtype, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unscaled posterior of uint8 images, both fp32 [N, 4, S/4, S/4] on the CPU."""
    device = next(vae.parameters()).device
    means, deviations = [], []
    for part in images.split(batch_size):
        with autocast(device, precision):
            posterior = vae.encode(to_signed(part).to(device, memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.float().cpu())
        deviations.append(posterior.std.float().cpu())
    return torch.cat(means), torch.cat(deviations)


def to_signed(images: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Mixed precision for bfloat16, nothing for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)
