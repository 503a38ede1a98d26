"""Train a small latent diffusion prior on a captioned image folder and write it as a Stable Diffusion folder.

    python -m diffdfkd.recipes.pretrain_prior --images icons --output prior

Three parts, each resumed by the same command: an autoencoder (AutoencoderKL), then a text encoder (CLIPTextModel with a
tokenizer learnt from the captions) together with a UNet (UNet2DConditionModel, noise prediction). The folder that comes
out loads with `diffusers.StableDiffusionPipeline.from_pretrained`.
"""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import Tensor, nn

from diffdfkd.engine.checkpoint import state_digest
from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.captioned_folder import CaptionedImages, read_captioned_folder
from diffdfkd.recipes.command import run_command
from diffdfkd.recipes.pretrain_vae import LATENT_CHANNELS, autocast, encode, fit_scale, load_vae, make_vae, train_vae
from diffdfkd.recipes.pretraining import Outcome, Plan, place, pretrain
from diffdfkd.recipes.prior_folder import make_scheduler, make_text_encoder, make_unet, write_pipeline
from diffdfkd.recipes.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SNR_CAP = 5.0  # min-SNR weighting (arXiv 2303.09556): nearly clean latents teach little


@dataclass(frozen=True)
class PriorTraining:
    """Everything that decides the prior; widths default to the demo's 32x32 grey images."""

    images: Path
    output: Path
    checkpoints: Path
    vae: Path | None = None
    """A prior's folder whose autoencoder is taken as it is; None to train one."""
    steps: int = 4000
    vae_steps: int = 2000
    batch_size: int = 64
    vae_batch_size: int = 64
    learning_rate: float = 8e-4
    vae_learning_rate: float = 1.5e-3
    seed: int = 0
    vae_channels: tuple[int, int, int] = (12, 24, 48)
    unet_channels: tuple[int, int] = (64, 96)
    text_width: int = 96
    caption_dropout: float = 0.1
    checkpoint_every: int = 250
    precision: str = "bfloat16"
    device: str = "cpu"
    provenance: str = ""
    example: str | None = None
    """Prompt that the model card shows; None for the most frequent caption."""
    licence: str = "apache-2.0"
    command: list[str] = field(default_factory=list)


def pretrain_prior(training: PriorTraining) -> Path:
    """Train or continue all parts and write the folder `training.output`; returns it.

    Raises UserError for a bad image folder, bad settings or checkpoints of another run.
    """
    if training.precision not in PRECISIONS:
        raise UserError(
            f"--precision: {training.precision!r} is not one of {', '.join(PRECISIONS)}; choose one of these"
        )
    for name in ("steps", "vae_steps", "batch_size", "vae_batch_size", "checkpoint_every"):
        if getattr(training, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(training, name)} is not allowed; give 1 or more")
    from diffusers.utils import logging

    logging.disable_progress_bar()
    data = read_captioned_folder(training.images)
    device, precision = torch.device(training.device), PRECISIONS[training.precision]
    channels, side = data.images.shape[1:3]

    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        shared = {"images": data.digest()[:16], "seed": str(training.seed), "precision": training.precision}
        vae_outcome = None
        if training.vae is not None:
            vae = load_vae(training.vae, data.images)
            place(vae, device)
            fit_scale(vae, data.images, precision)
        else:
            vae = make_vae(channels, side, training.vae_channels)
            place(vae, device)
            vae_plan = Plan(
                name="vae",
                steps=training.vae_steps,
                learning_rate=training.vae_learning_rate,
                seed=training.seed,
                checkpoint=training.checkpoints / "vae.pt",
                checkpoint_every=training.checkpoint_every,
                settings=shared
                | {"batch size": str(training.vae_batch_size), "vae channels": str(tuple(training.vae_channels))},
            )
            vae_outcome = train_vae(vae, data.images, training.vae_batch_size, precision, vae_plan)

        tokenizer = build_tokenizer(data.captions, training.output / "tokenizer")
        torch.manual_seed(training.seed + 1)
        text_encoder = make_text_encoder(tokenizer, training.text_width)
        place(text_encoder, device)
        unet = make_unet(LATENT_CHANNELS, side // 4, training.unet_channels, training.text_width)
        place(unet, device)
    scheduler = make_scheduler()
    unet_plan = Plan(
        name="unet",
        steps=training.steps,
        learning_rate=training.learning_rate,
        seed=training.seed,
        checkpoint=training.checkpoints / "unet.pt",
        checkpoint_every=training.checkpoint_every,
        settings=shared
        | {
            "batch size": str(training.batch_size),
            "unet channels": str(tuple(training.unet_channels)),
            "text width": str(training.text_width),
            "caption dropout": str(training.caption_dropout),
            "autoencoder": state_digest(vae.state_dict())[:16],
        },
    )
    unet_outcome = train_unet(
        unet,
        text_encoder,
        tokenizer,
        vae,
        scheduler,
        data,
        training.batch_size,
        training.caption_dropout,
        precision,
        unet_plan,
    )
    write_pipeline(training.output, vae, unet, text_encoder, tokenizer, scheduler)
    card = model_card(training, data, vae_outcome, unet_outcome)
    (training.output / "README.md").write_text(card, encoding="utf-8")
    return training.output


def train_unet(
    unet: "UNet2DConditionModel",
    text_encoder: "CLIPTextModel",
    tokenizer: "CLIPTokenizer",
    vae: "AutoencoderKL",
    scheduler: "DDIMScheduler",
    data: CaptionedImages,
    batch_size: int,
    caption_dropout: float,
    precision: torch.dtype,
    plan: Plan,
) -> Outcome:
    """Noise prediction with min-SNR weights; a dropped caption becomes "", which is what guidance steers away from."""
    device = next(unet.parameters()).device
    mean, deviation = encode(vae, data.images, precision)
    scale = float(dict(vae.config)["scaling_factor"])
    prompts = ["", *dict.fromkeys(data.captions)]
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    caption = torch.tensor([index_of[text] for text in data.captions])
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids  # [P, 16]
    alpha_bar = scheduler.alphas_cumprod.float()
    snr = alpha_bar / (1 - alpha_bar)

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        pick = torch.randint(len(caption), (batch_size,), generator=generator)
        latents = mean[pick] + deviation[pick] * torch.randn(mean[pick].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        # One timestep from each of B equal parts of the schedule: the same law, a steadier loss.
        t = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) * len(alpha_bar) / batch_size
        t = t.long().clamp_max(len(alpha_bar) - 1)
        kept = torch.rand(batch_size, generator=generator) >= caption_dropout
        a = alpha_bar[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * latents * scale + (1 - a).sqrt() * noise).to(device, memory_format=torch.channels_last)
        ids = tokens[torch.where(kept, caption[pick], 0)].to(device)
        with autocast(device, precision):
            states = text_encoder(input_ids=ids).last_hidden_state
            predicted = unet(noisy, t.to(device), states).sample
        error = (predicted.float() - noise.to(device)).square().mean(dim=(1, 2, 3))
        weight = (snr[t].clamp_max(SNR_CAP) / snr[t]).to(device)
        return {"loss": (weight * error).mean(), "mse": error.mean()}

    return pretrain(nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), loss_of, plan)


def model_card(training: PriorTraining, data: CaptionedImages, vae: Outcome | None, unet: Outcome) -> str:
    """The README.md of the folder: data, command, durations, losses and licence."""
    count, channels, side = data.images.shape[:3]
    parts = [("UNet and text encoder", unet, training.steps, training.batch_size)]
    if vae is not None:
        parts.insert(0, ("autoencoder", vae, training.vae_steps, training.vae_batch_size))
    rows = "\n".join(
        f"| {name} | {steps:,} x {batch} | {outcome.seconds / 60:.1f} min | "
        + ", ".join(f"{key} {value:.4f}" for key, value in outcome.losses.items())
        + " |"
        for name, outcome, steps, batch in parts
    )
    if vae is None:
        rows = f"| autoencoder | that of `{training.vae}` | – | – |\n" + rows
    example = training.example or Counter(data.captions).most_common(1)[0][0]
    return f"""---
license: {training.licence}
library_name: diffusers
pipeline_tag: text-to-image
---
# A small latent diffusion prior

Text to {side}x{side} images of {channels} channel(s). It loads with the stock pipeline:

```python
import torch
from diffusers import StableDiffusionPipeline
prior = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
generator = torch.Generator().manual_seed(0)
image = prior({example!r}, num_inference_steps=20, guidance_scale=2, generator=generator).images[0]
```

It knows the words of its captions and nothing else; images are as small and soft as a model of this size draws them.

**Data.** {count:,} images with {len(set(data.captions)):,} different captions (digest {data.digest()[:16]}).
{training.provenance}

**Made by** (seed {training.seed}, {training.precision}, {training.device}, {torch.get_num_threads()} threads):

```
{" ".join(training.command)}
```

| part | steps x batch | training time | last losses (running averages) |
|---|---|---|---|
{rows}

UNet and autoencoder are stored in fp16, the text encoder in fp32. Weights: {training.licence}.
"""


def main(
    images: Annotated[Path, typer.Option(help="Folder with metadata.jsonl (file_name, text) and its square images.")],
    output: Annotated[Path, typer.Option(help="Folder to write the prior to.")],
    checkpoints: Annotated[
        Path | None, typer.Option(help="Where the training's state lives [OUTPUT-checkpoints].")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="Prior's folder whose autoencoder is taken as it is [one is trained].")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of UNet and text encoder.")] = 4000,
    vae_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Images a step, UNet and text encoder.")] = 64,
    vae_batch_size: Annotated[int, typer.Option(help="Images a step, autoencoder.")] = 64,
    unet_channels: Annotated[tuple[int, int], typer.Option(help="Widths of the UNet, multiples of 8.")] = (64, 96),
    seed: int = 0,
    precision: Annotated[str, typer.Option(help="bfloat16 (mixed) or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads [torch's default].")] = None,
    provenance: Annotated[str, typer.Option(help="A sentence on the data for the model card.")] = "",
    example: Annotated[str | None, typer.Option(help="Prompt shown in the model card [most frequent caption].")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights for the model card.")] = "apache-2.0",
) -> None:
    """Train a small latent diffusion prior on a captioned image folder; the same command continues a cut run."""
    if threads is not None:
        torch.set_num_threads(threads)
    training = PriorTraining(
        images=images,
        output=output,
        checkpoints=checkpoints or output.with_name(output.name + "-checkpoints"),
        vae=vae,
        steps=steps,
        vae_steps=vae_steps,
        batch_size=batch_size,
        vae_batch_size=vae_batch_size,
        unet_channels=unet_channels,
        seed=seed,
        precision=precision,
        device=device,
        provenance=provenance,
        example=example,
        licence=licence,
        command=["python -m diffdfkd.recipes.pretrain_prior", *map(shlex.quote, sys.argv[1:])],
    )
    folder = pretrain_prior(training)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_command(main)
