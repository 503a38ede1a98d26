"""What is heavy in a guided step, as pure tensor functions of fixed shapes, each with a specification.

The sampler calls stages and knows nothing of the models behind them, so that any engine may stand in a stage's place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.guidance_decoder import GuidanceDecoder
from diffdfkd.engine.inversion import class_loss
from diffdfkd.engine.prior import Prior
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.specification import Port, Specification
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss
from diffdfkd.kernels.class_statistics import class_batchnorm_loss
from diffdfkd.kernels.kd_loss import adversarial_loss
from diffdfkd.kernels.launch import Kernel, at_least_float32


class Gradient(NamedTuple):
    """What the guidance chain returns for a batch of B samples."""

    gradient: Tensor
    """[B, c, h, w], of n L with respect to x0, n the samples that count; 0 where not ``finite``."""
    norm: Tensor
    """[B], |gradient|_2 of each sample."""
    finite: Tensor
    """[B] bool: latent, image, logits and gradient of the sample are finite."""
    losses: Tensor
    """[4], means over the samples that count: total, class, BatchNorm, adversarial."""


class UNet(Protocol):
    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor: ...


@runtime_checkable
class BufferedUNet(Protocol):
    """A UNet that reads from buffers of its own, which its caller may write into."""

    def claim(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, timestep, context): its buffers for the rows of ``context``, the last one filled."""
        ...

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor: ...


class Vjp(Protocol):
    """The UNet's prediction, and the product of its transposed Jacobian by the sample with a cotangent."""

    def __call__(
        self, sample: Tensor, timestep: Tensor, context: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class Chain(Protocol):
    def __call__(self, x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor) -> Gradient:
        """``weights`` [3] are those of class, BatchNorm and adversarial loss; a term that the chain lacks is passed."""
        ...


def unet_stage(prior: Prior, dtype: torch.dtype = torch.float32, guidance_scale: float = 1.0) -> UNet:
    """The prior's UNet: sample [N, c, h, w], timestep [N], context [N, T, D] -> float32 [N, c, h, w].

    ``dtype`` is the arithmetic inside (autocast); weights stay as they are. Autograd can cross the stage. A UNet that
    takes the guidance scale as an input is told ``guidance_scale``; any other one is not.
    """
    told = None
    if prior.guidance_width is not None:
        told = guidance_embedding(guidance_scale, prior.guidance_width).to(next(prior.unet.parameters()).device)

    def unet(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        sample = sample.contiguous(memory_format=torch.channels_last)
        condition = None if told is None else told.expand(len(sample), -1)
        with arithmetic(sample.device, dtype):
            output = prior.unet(
                sample, timestep, encoder_hidden_states=context, timestep_cond=condition, return_dict=False
            )[0]
        return dense(at_least_float32(output))

    return unet


def guidance_embedding(scale: float, width: int) -> Tensor:
    """[1, width] float32: how a distilled UNet is told the guidance scale (Luo et al., arXiv 2310.04378, section 4.2).

    Sines and cosines of 1000 (scale - 1) at geometric frequencies from 1 to 1e-4, as in diffusers' pipelines.
    """
    frequencies = torch.logspace(0, -4, width // 2, dtype=torch.float64)
    angles = 1000 * (scale - 1) * frequencies
    return functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2)).float()[None]


def decode_stage(prior: Prior, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """The prior's decoder: latents [B, c, h, w] -> images [B, C, H, W] in [0, 1], which autograd can cross.

    float32, or wider where the VAE is.
    """

    def decode(latents: Tensor) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        with arithmetic(latents.device, dtype):
            images = prior.decode(latents)
        return at_least_float32(images)

    return decode


def light_decode_stage(decoder: GuidanceDecoder, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """A light decoder in the place of `decode_stage`; its images may be smaller."""

    def decode(latents: Tensor) -> Tensor:
        with arithmetic(latents.device, dtype):
            images = decoder(latents)
        return at_least_float32(images)

    return decode


class Answers(NamedTuple):
    """What the networks make of a batch of latents."""

    logits: Tensor
    """[B, K] float32 or wider, the teacher's."""
    replies: Tensor
    """The same of the student; without one the teacher's again."""
    counts: Tensor
    """[B] bool: of those that did, which still count, since image and logits are finite."""


class Terms(NamedTuple):
    """The loss terms of a chain, as far as they take part."""

    taps: BatchNormTaps | None
    """On the teacher; read and reported, and guiding where ``batchnorm``."""
    batchnorm: bool
    opponent: nn.Module | None
    """The student, where its term has a weight."""
    weights: tuple[float, float, float]
    """The recipe's, of class, BatchNorm and adversarial loss."""


def chain_terms(
    teacher: nn.Module, taps: BatchNormTaps | None, guidance: GuidanceRecipe, student: nn.Module | None
) -> Terms:
    """Terms that have a weight and what they need. Raises UserError when none is left."""
    for network in (teacher, student):
        if network is not None and network.training:
            raise ValueError("teacher and student must be in eval mode, or a batch changes their statistics")
    opponent = student if guidance.adversarial_weight > 0 else None
    use_batchnorm = taps is not None and guidance.batchnorm_weight > 0
    if not (guidance.class_weight > 0 or use_batchnorm or opponent):
        raise UserError(
            "guidance: no student exists yet and all other terms have weight 0; "
            "set guidance.class_weight or guidance.batchnorm_weight above 0"
        )
    weights = (guidance.class_weight, guidance.batchnorm_weight, guidance.adversarial_weight)
    return Terms(taps, use_batchnorm, opponent, weights)


def answers(
    decode: Callable[[Tensor], Tensor],
    teacher: nn.Module,
    opponent: nn.Module | None,
    latents: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
) -> Answers:
    """Latents [B, c, h, w] decoded and shown to teacher and student, networks in ``dtype``."""
    with arithmetic(latents.device, dtype):
        images = at_least_float32(decode(latents))
        counts = counts & finite(images)
        logits = at_least_float32(teacher(images)).contiguous()
        replies = at_least_float32(opponent(images)).contiguous() if opponent else logits
    return Answers(logits, replies, counts & finite(logits) & finite(replies))


def guidance_chain(
    decode: Callable[[Tensor], Tensor],
    teacher: nn.Module,
    taps: BatchNormTaps | None,
    guidance: GuidanceRecipe,
    student: nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    kernel: Kernel = "auto",
) -> Callable[..., Gradient]:
    """A `Chain`: x0 [B, c, h, w], targets [B, K], alive [B], weights -> the gradient of n L with respect to x0.

    The gradient is that of n L, n the number of samples that count, so that its size does not depend on the batch.
    A sample that is not alive, or whose latent, image or logits are not finite, gets weight 0 in every loss term, and
    gradient 0. ``taps`` sit on ``teacher``; None without BatchNorm guidance. ``dtype`` is the arithmetic of the
    networks; moments and losses are float32. ``kernel`` is the form of L_bn and L_adv (kernels/launch.py). Which terms
    there are is the recipe's to say; their weights [3] come with each call, by default the recipe's. Raises UserError
    when no term with a weight is left.
    """
    terms = chain_terms(teacher, taps, guidance, student)
    class_by_class = guidance.statistics == "class"

    def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor | None = None) -> Gradient:
        shares = terms.weights if weights is None else weights.unbind()
        leaf, counts = usable_latents(x0, alive)
        leaf.requires_grad_()
        with torch.enable_grad():
            logits, replies, counts = answers(decode, teacher, terms.opponent, leaf, counts, dtype)
            zero = logits.new_zeros(())
            by_class = class_loss(logits, targets, counts)
            by_statistics = zero
            if taps is not None:
                inputs = [dense(activation) for activation in taps.inputs]
                running = (taps.running_means, taps.running_variances)
                with torch.set_grad_enabled(terms.batchnorm):
                    if class_by_class:
                        by_statistics = class_batchnorm_loss(inputs, *running, counts, targets, taps.factors)
                    else:
                        by_statistics = batchnorm_loss(inputs, *running, counts, taps.factors, kernel=kernel)
            by_student = adversarial_loss(replies, logits, counts, kernel=kernel) if terms.opponent else zero
            total = shares[0] * by_class + shares[1] * by_statistics + shares[2] * by_student
            (gradient,) = torch.autograd.grad(total * counts.sum(), leaf)
        if taps is not None:
            taps.clear()
        return found(gradient, counts, torch.stack([total, by_class, by_statistics, by_student]))

    return chain


def usable_latents(x0: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Latents that networks may see, 0 where not finite, as they take them; and [B] who counts."""
    counts = alive & finite(x0)
    return _where(counts, x0.detach(), 0).contiguous(memory_format=torch.channels_last), counts


def found(gradient: Tensor, counts: Tensor, losses: Tensor) -> Gradient:
    """What a chain returns of the gradient [B, c, h, w], of those that count [B] and of the losses [4]."""
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
    usable = counts & torch.isfinite(norm)
    return Gradient(
        gradient=dense(_where(usable, gradient, 0)),
        norm=torch.where(usable, norm, 0),
        finite=usable,
        losses=losses.detach(),
    )


def unet_specification(latent_shape: tuple[int, int, int], rows: int, tokens: int, width: int) -> Specification:
    """Of the UNet stage on ``rows`` samples (twice the batch under classifier-free guidance)."""
    latents = (rows, *latent_shape)
    return Specification(
        "unet",
        inputs=(
            Port("sample", latents, torch.float32),
            Port("timestep", (rows,), torch.float32),
            Port("context", (rows, tokens, width), torch.float32),
        ),
        outputs=(Port("output", latents, torch.float32),),
    )


def chain_specification(latent_shape: tuple[int, int, int], batch: int, classes: int) -> Specification:
    """Of the guidance chain on ``batch`` samples."""
    latents = (batch, *latent_shape)
    return Specification(
        "chain",
        inputs=(
            Port("x0", latents, torch.float32),
            Port("targets", (batch, classes), torch.float32),
            Port("alive", (batch,), torch.bool),
            Port("weights", (3,), torch.float32, batched=False),
        ),
        outputs=(
            Port("gradient", latents, torch.float32),
            Port("norm", (batch,), torch.float32),
            Port("finite", (batch,), torch.bool),
            Port("losses", (4,), torch.float32, batched=False),
        ),
    )


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast to ``dtype``; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def dense(values: Tensor) -> Tensor:
    """[B, C, ...] in one of the memory formats that kernels read; what lies otherwise is copied."""
    last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return values if last else values.contiguous()


def finite(values: Tensor) -> Tensor:
    """[B] bool: all of a sample's values are finite."""
    return torch.isfinite(values).flatten(1).all(1)


def _where(samples: Tensor, values: Tensor, other: float) -> Tensor:
    return torch.where(samples.view(-1, *[1] * (values.dim() - 1)), values, other)
