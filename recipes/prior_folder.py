"""The parts of a small prior beside its autoencoder, and the Stable Diffusion folder that they are written to."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer


def make_text_encoder(tokenizer: "CLIPTokenizer", width: int) -> "CLIPTextModel":
    """Token ids [B, 16] -> states [B, 16, width]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(latent_channels: int, side: int, channels: tuple[int, int], text_width: int) -> "UNet2DConditionModel":
    """Two levels: convolutions alone at the latent's size, attention to the caption at half of it and in the middle."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=tuple(
            max(1, width // 32) for width in channels
        ),  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def make_scheduler() -> "DDIMScheduler":
    """Stable Diffusion's schedule with a noisier end (beta 0.015, not 0.012): a sampler of a dozen steps starts near
    t = 914, where 0.012 would leave a tenth of the signal in what it takes for pure noise."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.015,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def write_pipeline(
    folder: Path,
    vae: "AutoencoderKL",
    unet: "UNet2DConditionModel",
    text_encoder: "CLIPTextModel",
    tokenizer: "CLIPTokenizer",
    scheduler: "DDIMScheduler",
) -> None:
    """UNet and autoencoder in fp16, the text encoder in fp32: diffusers loads its own parts as fp32 whatever is stored,
    transformers keeps the stored type, so this is what the stock pipeline runs without a word about dtypes."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        unet=unet.cpu().half(),
        text_encoder=text_encoder.cpu().float(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)  # type: ignore[attr-defined]  # diffusers loads lazily
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # written as 0600 otherwise, unreadable for the next user of a shared folder
