"""A batch larger than memory in micro-batches: the gradient of the whole batch's loss, exactly, and a UNet in parts.

L_cls and L_adv are sums over samples. L_bn is a function of the whole batch's moments: one pass without a graph gathers
them and differentiates L_bn with respect to them, and another one takes each micro-batch's gradient with these
derivatives held fixed (kernels/batchnorm_loss.py). So the networks never see more than a micro-batch; what grows with
the batch are latents and, by classes, two numbers per sample and channel.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffdfkd.engine.inversion import class_loss
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.stages import Gradient, UNet, answers, chain_terms, dense, found, usable_latents
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.batchnorm_loss import Distance, batchnorm_distance, held_loss
from diffdfkd.kernels.class_statistics import class_distance
from diffdfkd.kernels.kd_loss import adversarial_loss
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.moments import Moments, accumulate_moments, sample_moments_reference


def unet_in_parts(unet: UNet, rows: int) -> UNet:
    """The UNet, called on at most so many rows at once."""

    def parts(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        each = zip(sample.split(rows), timestep.split(rows), context.split(rows), strict=True)
        return dense(torch.cat([unet(*part) for part in each]))

    return parts


class Held(NamedTuple):
    """L_bn of the whole batch, and its derivatives by which a micro-batch's part of the gradient is taken."""

    loss: Tensor
    """[]."""
    samples: Tensor
    """[] int64, how many count."""
    part: Callable[[int, list[Tensor], Tensor], Tensor]
    """(index of the micro-batch, inputs of the layers, [b] who counts) -> [], whose gradient is L_bn's."""


def micro_batched_chain(
    decode: Callable[[Tensor], Tensor],
    teacher: nn.Module,
    taps: BatchNormTaps | None,
    guidance: GuidanceRecipe,
    student: nn.Module | None = None,
    *,
    size: int,
    dtype: torch.dtype = torch.float32,
    kernel: Kernel = "auto",
) -> Callable[..., Gradient]:
    """As `guidance_chain`, its networks on at most ``size`` samples at once; equal to it but for rounding."""
    terms = chain_terms(teacher, taps, guidance, student)

    def gather(parts: Sequence[tuple[Tensor, ...]], targets: Tensor) -> Held:
        assert taps is not None
        running = (taps.running_means, taps.running_variances)
        moments: Moments | None = None
        by_sample: list[list[tuple[Tensor, Tensor]]] = []
        counted = []
        for latents, _, living in parts:
            leaf, counts = usable_latents(latents, living)
            counts = answers(decode, teacher, terms.opponent, leaf, counts, dtype).counts
            inputs = [dense(activation) for activation in taps.inputs]
            if guidance.statistics == "class":
                by_sample.append([sample_moments_reference(activation) for activation in inputs])
            else:
                moments = accumulate_moments(inputs, counts, moments, kernel=kernel)
            counted.append(counts)
            taps.clear()
        if moments is None:
            return held_by_class(by_sample, running, torch.cat(counted), targets, taps.factors)
        distance = batchnorm_distance(moments, *running, taps.factors)
        return held_moments(moments, distance, kernel)

    def chain(x0: Tensor, targets: Tensor, alive: Tensor, weights: Tensor | None = None) -> Gradient:
        shares = terms.weights if weights is None else weights.unbind()
        parts = list(zip(x0.split(size), targets.split(size), alive.split(size), strict=True))
        held = None
        if terms.batchnorm:
            with torch.no_grad():
                held = gather(parts, targets)
        gradients, counted, by_class, by_student = [], [], [], []
        for index, (latents, wanted, living) in enumerate(parts):
            leaf, counts = usable_latents(latents, living)
            leaf.requires_grad_()
            with torch.enable_grad():
                logits, replies, counts = answers(decode, teacher, terms.opponent, leaf, counts, dtype)
                n = counts.sum()
                zero = logits.new_zeros(())
                # Sums over the micro-batch: a term's mean times those that count.
                of_class = class_loss(logits, wanted, counts) * n
                of_student = adversarial_loss(replies, logits, counts, kernel=kernel) * n if terms.opponent else zero
                total = shares[0] * of_class + shares[2] * of_student
                if held is not None and taps is not None:
                    inputs = [dense(activation) for activation in taps.inputs]
                    total = total + shares[1] * held.part(index, inputs, counts) * held.samples
                gradients.append(torch.autograd.grad(total, leaf)[0])
            if taps is not None:
                taps.clear()
            counted.append(counts)
            by_class.append(of_class.detach())
            by_student.append(of_student.detach())
        counts = torch.cat(counted)
        n = counts.sum().clamp(min=1)
        losses = [torch.stack(by_class).sum() / n, torch.zeros_like(by_class[0]), torch.stack(by_student).sum() / n]
        if held is not None:
            losses[1] = held.loss
        whole = shares[0] * losses[0] + shares[1] * losses[1] + shares[2] * losses[2]
        return found(torch.cat(gradients), counts, torch.stack([whole, *losses]))

    return chain


def held_moments(moments: Moments, distance: Distance, kernel: Kernel) -> Held:
    """By the moments of the whole batch."""

    def part(index: int, inputs: list[Tensor], counts: Tensor) -> Tensor:
        return held_loss(inputs, counts, moments, distance, kernel=kernel)

    return Held(distance.loss, moments.samples, part)


def held_by_class(
    by_sample: list[list[tuple[Tensor, Tensor]]],
    running: tuple[list[Tensor], list[Tensor]],
    counts: Tensor,
    targets: Tensor,
    factors: Tensor | None,
) -> Held:
    """By each sample's own moments, of which those of its class are made; ``by_sample`` per micro-batch and layer."""
    layers = [tuple(torch.cat(each) for each in zip(*parts, strict=True)) for parts in zip(*by_sample, strict=True)]
    with torch.enable_grad():
        leaves = [(means.requires_grad_(), variances.requires_grad_()) for means, variances in layers]
        loss = class_distance(leaves, *running, counts, targets, factors)
        flat = torch.autograd.grad(loss, [leaf for pair in leaves for leaf in pair])
    sizes = [len(each[0][0]) for each in by_sample]
    derivatives = [each.split(sizes) for each in flat]  # [2 L] of a [b, C] for each micro-batch

    def part(index: int, inputs: list[Tensor], counts: Tensor) -> Tensor:
        own = counts[:, None]
        values = [moment for activation in inputs for moment in sample_moments_reference(activation)]
        terms = [
            (derivative[index] * torch.where(own, value, 0)).sum()
            for derivative, value in zip(derivatives, values, strict=True)
        ]
        return torch.stack(terms).sum()

    return Held(loss.detach(), counts.sum(), part)
