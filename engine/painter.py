"""From sample ids and classes to images in bytes: one batch of the guided sampler, decoded, resized and encoded."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.backends.serve import Subject
from diffdfkd.engine.classifier import Classifier, convert_channels
from diffdfkd.engine.combinations import fork_step
from diffdfkd.engine.cutmix import CutMixPlan
from diffdfkd.engine.denoiser import Denoiser
from diffdfkd.engine.fan_out import plan_fan_out
from diffdfkd.engine.memory import fitting, machine_memory, refuse_more
from diffdfkd.engine.pixels import encode_image
from diffdfkd.engine.plan import (
    SAMPLES_PER_ROUND,
    ShardPlan,
    block_size,
    lasting,
    round_labels,
    sample_ids,
    weights_digest,
)
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.prompts import class_prompts, draw_prompts, embed_prompts
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.sampler import Trajectory
from diffdfkd.engine.shards import Sample
from diffdfkd.engine.stages import decode_stage, finite
from diffdfkd.kernels.philox import INITIAL_NOISE, philox_normal

LOSSES = ("total", "class", "batchnorm", "adversarial")
LATENT_PIXELS_AT_ONCE = 2**16
"""Decoded together, 16 latents of 64x64; a constant, since the split may show in an image's last bit."""

SMALLER = "give a smaller one, in another output folder if this holds shards: they stay, and keep their batch size"


@dataclass
class Models:
    """The networks of a synthesis, all on one device, frozen and in eval mode."""

    prior: Prior
    teacher: Classifier
    student: Classifier | None = None
    """Snapshot after the previous round's distillation; needed from the second round on with adversarial guidance."""

    def digests(self, prompts: list[str]) -> tuple[str, str]:
        """Of the prior as far as these prompts reach it, and of the teacher."""
        prior = self.prior
        text_encoder: Any = prior.text_encoder
        configs = (prior.unet.config, prior.vae.config, text_encoder.config.to_dict(), prior.scheduler_config)
        tokens = prior.tokenizer(prompts, padding="max_length", truncation=True).input_ids
        networks = (prior.unet, prior.vae, prior.text_encoder)
        return weights_digest(networks, *map(lasting, configs), tokens), weights_digest([self.teacher])


@dataclass(frozen=True)
class Painting:
    """A batch of B finished samples, on the CPU."""

    images: Tensor
    """[B, C, H, W] uint8; meaningless where not alive."""
    alive: Tensor
    """[B] bool: finite from the first step to the image."""
    targets: Tensor
    """[B, K] float32."""
    losses: Tensor
    """[S, 4] batch means as in LOSSES, NaN in unguided steps."""
    latents: Tensor
    """[B], root mean square of a finished latent's values; about 1 where a decoder is at home."""
    plan: CutMixPlan
    prompts: tuple[str, ...] | None = None
    """Of each sample, where a class has several."""


class Batch(NamedTuple):
    """Denoised samples of a shard."""

    ids: Tensor
    """[B] int64."""
    labels: Tensor
    """[B] int64."""
    finish: Callable[[], Painting]
    """Decodes them; to be called once."""


class Painter:
    """What all batches of a round share: prompt embeddings, coefficient table, stages. A context manager.

    ``round`` decides whether the student takes part.
    """

    def __init__(self, recipe: Recipe, models: Models, round: int) -> None:
        self.recipe, self.round, self.prior = recipe, round, models.prior
        self.device = next(models.prior.unet.parameters()).device
        self.decode = decode_stage(models.prior, getattr(torch, recipe.prior.dtype))
        self.prompts = class_prompts(recipe)
        self.context, self.rows = embed_prompts(models.prior, self.prompts)
        student = models.student if uses_student(recipe, round) else None
        # Guidance goes through whatever decodes the images.
        self.denoiser = Denoiser(
            Subject(recipe, models.prior, models.teacher, self.context, student), lambda latents: self.decode(latents)
        )
        self._second: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.denoiser.close()

    def paint(self, ids: Tensor, classes: Tensor, *, guided: bool = True, mixed: bool = True) -> Painting:
        """Samples of the ids [B] and classes [B] int64; optionally without guidance or without CutMix and fan-out.

        With fan-out they are a block (engine/plan.py): the first children, who are the trajectories, then the second
        ones. Raises UserError where the batch does not fit into memory.
        """
        return self.begin(ids, classes, guided=guided, mixed=mixed)()

    def begin(self, ids: Tensor, classes: Tensor, *, guided: bool = True, mixed: bool = True) -> Callable[[], Painting]:
        """The same as far as the finished latents, and a function that decodes them, for any thread to call once.

        On CUDA nothing is waited for before that call, which decodes on a stream of its own.
        """
        fan_out = self.recipe.synthesis.fan_out if mixed else 1
        trunk = len(ids) // fan_out
        # Children go on with their parent's prompt.
        drawn = draw_prompts(self.recipe, ids[:trunk], classes[:trunk])
        several = len(self.prompts) > len(self.recipe.teacher.classes)
        with self._fitting(ids):
            plan, trajectory = self._denoise(ids.view(fan_out, trunk), classes[:trunk], drawn, guided, mixed)
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def finish() -> Painting:
            with self._fitting(ids), self._beside(ready):
                images, whole = self._finish(trajectory.latents)
                return Painting(
                    images=images,
                    alive=trajectory.alive.cpu() & whole,
                    targets=trajectory.targets.cpu(),
                    losses=trajectory.losses.cpu(),
                    latents=trajectory.latents.square().mean((1, 2, 3)).sqrt().cpu(),
                    plan=plan,
                    prompts=tuple(self.prompts[i] for i in drawn.repeat(fan_out).tolist()) if several else None,
                )

        return finish

    def _fitting(self, ids: Tensor) -> AbstractContextManager[None]:
        tried = f"a batch of {len(ids):,} images on the {self.device.type}"
        return fitting("synthesis.batch_size", tried, smaller(self.recipe))

    @contextmanager
    def _beside(self, ready: Any) -> Iterator[None]:
        """On CUDA a second stream, from the event on."""
        if ready is None:
            yield
            return
        if self._second is None:
            self._second = torch.cuda.Stream(self.device)
        self._second.wait_event(ready)
        with torch.cuda.stream(self._second):
            yield

    @torch.no_grad()
    def _denoise(
        self, ids: Tensor, classes: Tensor, drawn: Tensor, guided: bool, mixed: bool
    ) -> tuple[CutMixPlan, Trajectory]:
        """From ids [m, B] of all children, first those who are the trajectories, and classes and prompts [B]."""
        recipe = self.recipe
        cutmix = recipe.cutmix if mixed else recipe.cutmix.model_copy(update={"every": 0})
        shape = self.prior.latent_shape
        steps, fork = recipe.synthesis.steps, fork_step(recipe.synthesis)
        plan = plan_fan_out(cutmix, classes, len(recipe.teacher.classes), steps, shape[1:], recipe.seed, ids, fork)
        ids = ids.to(self.device)
        context = self.context[self.rows[drawn.to(self.device)]]
        if self.denoiser.scale != 1:
            context = torch.cat([self.context[-1:].expand_as(context), context])
        noise = philox_normal(recipe.seed, ids[0], 0, INITIAL_NOISE, shape)
        return plan, self.denoiser(context, noise, ids[0], plan, guided=guided)

    @torch.no_grad()
    def _finish(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, c, h, w] to uint8 images [B, C, H, W] of the saved size, and which of them were finite."""
        teacher, size = self.recipe.teacher, saved_size(self.recipe)
        # Resized as the teacher would resize, so that it sees in the file what it saw during guidance.
        mode = teacher.interpolation if size == teacher.size else "bilinear"
        finished, whole = [], []
        at_once = max(1, LATENT_PIXELS_AT_ONCE // latents[0, 0].numel())
        for part in latents.split(min(at_once, self.recipe.guidance.micro_batch or at_once)):
            images = self.decode(part)
            whole.append(finite(images))
            if teacher.channels == 1:
                images = convert_channels(images, 1)
            if images.shape[-2:] != (size, size):
                images = functional.interpolate(images, (size, size), mode=mode, antialias=mode != "nearest")
            finished.append((images.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(finished), torch.cat(whole).cpu()

    def batches(self, plan: ShardPlan) -> Iterator["Batch"]:
        """The shard's batches in order, each with all its children, denoised as they are asked for."""
        end, block = plan.first + plan.samples, block_size(self.recipe)
        for first in range(plan.first, end, block):
            count = min(block, end - first)
            ids = sample_ids(self.round, first, count)
            labels = round_labels(self.recipe, self.round, first, count)
            finish = self.begin(ids, labels)
            if self.device.type == "cpu":
                # The cores are busy either way, and torch's threads are best woken by one.
                painting = finish()
                finish = functools.partial(_given, painting)
            yield Batch(ids, labels, finish)

    def samples(self, batch: "Batch", painted: Callable[[Painting], None]) -> Iterator[Sample | None]:
        """A batch's encoded samples in order, None for a dropped one; ``painted`` is told of the batch first."""
        synthesis, painting = self.recipe.synthesis, batch.finish()
        painted(painting)
        losses = last_losses(painting.losses)
        for i, (id, label) in enumerate(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True)):
            if not painting.alive[i]:
                yield None
                continue
            image = encode(painting.images[i], synthesis.format, synthesis.quality)
            key = f"{self.round:03d}-{id % SAMPLES_PER_ROUND:08d}"
            record = self._record(painting, i, id, label, losses)
            if (parent := i % (len(batch.ids) // synthesis.fan_out)) != i:
                record["forked_from"] = int(batch.ids[parent])
            yield Sample(key, image, record, synthesis.format)

    def _record(
        self, painting: Painting, i: int, id: int, label: int, losses: dict[str, float] | None
    ) -> dict[str, Any]:
        record: dict[str, Any] = {
            "class": label,
            "class_name": self.recipe.teacher.classes[label],
            "sample": id,
            "round": self.round,
            "seed": self.recipe.seed,
        }
        if painting.prompts is not None:
            record["prompt"] = painting.prompts[i]
        if losses is not None:
            record["losses"] = losses
        if weights := soft_label(painting.targets[i]):
            record["soft_label"] = weights
        if parents := painting.plan.lineage[i]:
            height, width = self.prior.latent_shape[1:]
            record["parents"] = [
                {
                    "step": parent.step,
                    "sample": parent.partner,
                    "area": round_(parent.area),
                    "box": [round_(x / n) for x, n in zip(parent.box, (height, width) * 2, strict=True)],
                }
                for parent in parents
            ]
        return record


def _given(painting: Painting) -> Painting:
    return painting


def smaller(recipe: Recipe) -> str:
    """The cure for a batch that does not fit: micro-batches too, where the recipe can have them."""
    guidance, engine = recipe.guidance, recipe.engine
    if guidance.micro_batch is not None:
        return f"lower guidance.micro_batch, now {guidance.micro_batch}, or {SMALLER}"
    if guidance.mode == "clean" and {engine.unet, engine.chain} <= {"auto", "eager"}:
        return f"set guidance.micro_batch, the images that the networks see at once, or {SMALLER}"
    return SMALLER


def refuse_batch(prior: Prior, images: int, micro_batch: int | None = None) -> None:
    """UserError for a batch whose latents and images alone are more than all memory, before any is taken.

    Of the images there are no more than ``micro_batch`` at once.
    """
    device = next(prior.unet.parameters()).device
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine_memory()
    pixels = min(images, micro_batch or images) * prior.channels * math.prod(prior.image_size)
    needed = 4 * (4 * math.prod(prior.latent_shape) * images + pixels)
    cure = SMALLER if micro_batch else f"{SMALLER}, or set guidance.micro_batch where images are what is too many"
    refuse_more("synthesis.batch_size", f"a batch of {images:,} images", needed, there, cure)


def uses_student(recipe: Recipe, round: int) -> bool:
    """Whether the round's guidance looks at the student's disagreement."""
    return round > 0 and recipe.guidance.mode != "none" and recipe.guidance.adversarial_weight > 0


def saved_size(recipe: Recipe) -> int:
    """Height and width of the saved images in pixels."""
    return recipe.synthesis.size or recipe.teacher.size


def encode(image: Tensor, format: Literal["png", "webp"], quality: int | None = None) -> bytes:
    """File of a uint8 image [C, H, W] with 1 or 3 channels; equal images give equal bytes.

    Lossless, unless a `quality` from 1 to 100 is given for WebP.
    """
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return encode_image(Image.fromarray(pixels.contiguous().numpy()), format, quality)


def last_losses(losses: Tensor) -> dict[str, float] | None:
    """Of the last guided step in [S, 4], by name; None without guidance."""
    return _losses(losses, -1)


def first_losses(losses: Tensor) -> dict[str, float] | None:
    """Of the first guided step in [S, 4], by name; None without guidance."""
    return _losses(losses, 0)


def _losses(losses: Tensor, which: int) -> dict[str, float] | None:
    guided = losses[torch.isfinite(losses[:, 0])]
    if not len(guided):
        return None
    return {name: round_(value) for name, value in zip(LOSSES, guided[which].tolist(), strict=True)}


def soft_label(target: Tensor) -> dict[str, float] | None:
    """Weights above 0 by class index of a target [K]; None where one class has it all."""
    weights = {str(k): round_(target[k].item()) for k in target.nonzero().flatten().tolist()}
    return weights if len(weights) > 1 else None


def round_(value: float) -> float:
    """Six decimals: more than the figure is worth, and short in JSON."""
    return round(value, 6)
