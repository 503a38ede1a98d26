"""The loss terms that pull a sample towards the teacher's training distribution; nothing of gradients.

L = a_bn L_bn + a_cls L_cls + a_adv L_adv, as in DiffDFKD (arXiv 2504.00870). Every term takes a weight of 0 or 1 per
sample. A sample of weight 0 counts nowhere: it is masked, never multiplied, so that its NaN stays its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class SampleMoments(torch.autograd.Function):
    """Mean and biased variance of each sample and channel, [B, C, ...] -> two of [B, C].

    The backward pass in closed form reads the activation once; autograd's own takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor) -> tuple[Tensor, Tensor]:
        space = tuple(range(2, activation.dim()))
        mean = activation.mean(space, keepdim=True)
        # Two passes, so that a large mean does not cancel the variance.
        variance = (activation - mean).square_().mean(space)
        ctx.save_for_backward(activation, mean)
        return mean.flatten(1), variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        activation, mean = ctx.saved_tensors
        by_mean, by_variance = (gradient.view_as(mean) for gradient in gradients)
        positions = activation[0, 0].numel()
        return torch.addcmul(by_mean / positions, activation - mean, 2 * by_variance / positions)


def batch_moments(activation: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, over space and the samples of weight 1: [B, C, ...], [B] -> [C], [C].

    All zero where no sample has weight 1.
    """
    activation = activation.to(torch.promote_types(activation.dtype, torch.float32))
    if activation.dim() == 2:
        activation = activation[:, :, None]
    means, variances = SampleMoments.apply(activation)  # [B, C]
    counts = (weight > 0)[:, None]
    n = counts.sum().clamp(min=1)
    # Masked before anything is shared: a NaN would come back to every sample through the gradient of the mean.
    means, variances = torch.where(counts, means, 0), torch.where(counts, variances, 0)
    mean = means.sum(0) / n
    # Variance of the whole from the variance within and between samples.
    variance = (variances + torch.where(counts, means - mean, 0).square()).sum(0) / n
    return mean, variance


def batchnorm_loss(
    inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor], weight: Tensor
) -> Tensor:
    """L_bn: sum over layers of |mean - running mean|_2 + |variance - running variance|_2, in float32 or wider.

    ``inputs`` are the BatchNorm layers' inputs [B, C, ...], ``means`` and ``variances`` their running statistics [C],
    ``weight`` [B] is 0 or 1. The variance is biased, as published; 0 where no sample has weight 1.
    """
    terms = []
    for activation, running_mean, running_variance in zip(inputs, means, variances, strict=True):
        mean, variance = batch_moments(activation, weight)
        terms.append(torch.linalg.vector_norm(mean - running_mean))
        terms.append(torch.linalg.vector_norm(variance - running_variance))
    return torch.where((weight > 0).any(), torch.stack(terms).sum(), 0)


def class_loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """L_cls: cross-entropy of logits [B, K] with soft targets [B, K], mean over the samples of weight 1."""
    entropy = -(targets * functional.log_softmax(logits, dim=1)).sum(1)
    return _mean(entropy, weight)


def adversarial_loss(teacher_logits: Tensor, student_logits: Tensor, weight: Tensor) -> Tensor:
    """L_adv: minus the mean of KL(teacher || student) where both name the same class; logits [B, K].

    The teacher's logits are constants: the gradient reaches the image through the student alone.
    """
    teacher = functional.log_softmax(teacher_logits.detach(), dim=1)
    student = functional.log_softmax(student_logits, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(1)
    agree = teacher_logits.argmax(1) == student_logits.argmax(1)
    return -_mean(torch.where(agree, divergence, 0), weight)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    counts = weight > 0
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)
