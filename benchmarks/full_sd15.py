"""One guided step of the full Stable Diffusion 1.5 at 512 pixels on the CPU, with random weights: memory and time.

    python -m diffdfkd.benchmarks.full_sd15
    python -m diffdfkd.benchmarks.full_sd15 --dtype bfloat16 --teacher-size 32

UNet, VAE and text encoder are those of SD 1.5 by their published configurations, written out below; nothing is fetched.
The step is what a run does, by the run's own code: both halves of classifier-free guidance through the UNet, the
gradient of class and BatchNorm losses of an untrained ResNet-18 through the whole decoder, the last decoding. Printed
is one line of JSON; the exit status is 1 where something is not finite or memory was above the limit. It takes minutes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffdfkd.benchmarks.conditions import peak_memory

LIMIT = 16 * 2**30
"""Bytes of memory that the step may take."""

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
UNET_PARAMETERS = 859_520_964
VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


class ByteTokenizer:
    """Bytes of a prompt as CLIP's token numbers: random weights do not know words."""

    model_max_length = 77

    def __call__(self, prompts: list[str], **_: Any) -> SimpleNamespace:
        import torch

        start, end = 49406, 49407
        rows = [[start, *prompt.encode()[:75], *[end] * 77][:77] for prompt in prompts]
        return SimpleNamespace(input_ids=torch.tensor(rows))


def build_prior(dtype: str) -> Any:
    """SD 1.5 with random weights, as `diffdfkd.engine.prior.load_prior` would return it."""
    import diffusers
    import torch
    import transformers

    from diffdfkd.engine.prior import Prior, quiet

    torch.manual_seed(0)
    unet: Any = diffusers.UNet2DConditionModel(**UNET)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert parameters == UNET_PARAMETERS, f"{parameters} parameters are not Stable Diffusion 1.5's"
    vae: Any = diffusers.AutoencoderKL(**VAE)
    text_encoder: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER))
    for network in (unet, vae, text_encoder):
        network.eval().requires_grad_(False)
    with quiet():
        unet, vae = (network.to(getattr(torch, dtype), memory_format=torch.channels_last) for network in (unet, vae))
    return Prior(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=ByteTokenizer(),
        scheduler_config=SCHEDULER,
        folder=Path("none"),
        channels=3,
        image_size=(512, 512),
        latent_shape=(4, 64, 64),
        scaling_factor=VAE["scaling_factor"],
        shift_factor=0.0,
        prediction_type="epsilon",
        licence=None,
    )


def build_teacher(size: int) -> Any:
    """torchvision's ResNet-18 for ten classes, frozen, its BatchNorm statistics away from those of noise."""
    import torch
    import torchvision

    from diffdfkd.engine.classifier import Classifier, Preprocessing

    model = torchvision.models.resnet18(num_classes=10)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean = 0.1 * torch.randn(layer.num_features)
    classes = [f"class {index}" for index in range(10)]
    return Classifier(model, Preprocessing(3, size, mean, std, "bilinear"), classes).eval().requires_grad_(False)


def measure(dtype: str, teacher_size: int) -> dict[str, Any]:
    """One image, one guided step: seconds by stage, peak memory of this process, and whether all was finite."""
    import torch

    from diffdfkd.engine.painter import Models, Painter
    from diffdfkd.engine.recipe import Recipe

    started = time.perf_counter()
    prior, teacher = build_prior(dtype), build_teacher(teacher_size)
    recipe = Recipe.model_validate(
        {
            "prior": {"path": "none", "dtype": dtype},
            "teacher": {"architecture": "torchvision:resnet18", "classes": teacher.classes, "size": teacher_size},
            "student": {"architecture": "small_cnn"},
            # The one schedule whose single step begins at pure noise with SD 1.5's configuration.
            "synthesis": {"sampler": "lcm", "steps": 1, "guidance_scale": 7.5, "batch_size": 1},
            "guidance": {"mode": "clean", "class_weight": 1.0, "batchnorm_weight": 0.1},
            "device": "cpu",
        }
    )
    seconds = {"build": time.perf_counter() - started}

    def timed(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = stage(*values, **named)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            print(f"{name}: {seconds[name]:.1f} s, peak {peak_memory() / 2**30:.2f} GiB", file=sys.stderr)
            return result

        return call

    with Painter(recipe, Models(prior, teacher), 0) as painter:
        denoiser = painter.denoiser
        assert denoiser.chain is not None
        denoiser.unet = timed("unet", denoiser.unet)
        denoiser.chain = timed("chain", denoiser.chain)
        painter.decode = timed("decode", painter.decode)
        painting = painter.paint(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return {
        "dtype": dtype,
        "teacher_size": teacher_size,
        "threads": torch.get_num_threads(),
        "finite": bool(painting.alive.all()) and bool(torch.isfinite(painting.losses).all()),
        "losses": [round(value, 4) for value in painting.losses[0].tolist()],
        "peak_gib": round(peak_memory() / 2**30, 2),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of UNet and VAE")
    parser.add_argument("--teacher-size", type=int, default=224, help="pixels of the teacher's input")
    arguments = parser.parse_args()
    import resource

    # What does not fit is refused rather than swapped or killed.
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    result = measure(arguments.dtype, arguments.teacher_size)
    print(json.dumps(result))
    if not result["finite"] or result["peak_gib"] * 2**30 > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
