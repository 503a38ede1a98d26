"""L_bn class by class: the samples of each class against the statistics that the layers remember of all of them.

    L_bn = mean over the classes that are present of L_bn of that class's samples        (kernels/batchnorm_loss.py)

Plain torch on every device: each activation is read once for the moments of each sample, [B, C], and once for its
gradient; what follows are products of these with who belongs to which class, without a loop over classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdfkd.kernels.activation import check_vectors, named_layers, settle_inputs
from diffdfkd.kernels.batchnorm_loss import check_factors
from diffdfkd.kernels.moments import sample_moments_reference


def class_batchnorm_loss(
    inputs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None = None,
) -> Tensor:
    """As `batchnorm_loss`, of each class by itself; a sample is of the class that ``targets`` [B, K] gives most to.

    Raises ValueError for what does not fit together.
    """
    settle_inputs(named_layers(inputs), weight, "reference")
    check_vectors(inputs, weight.device, means=means, variances=variances)
    check_factors(factors, len(inputs), weight.device)
    pairs = [sample_moments_reference(activation) for activation in inputs]
    return class_distance(pairs, means, variances, weight, targets, factors)


def class_distance(
    moments: Sequence[tuple[Tensor, Tensor]],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None = None,
) -> Tensor:
    """The same from the mean and the biased variance [B, C] of each sample in each layer."""
    counts = (weight > 0)[:, None]
    classes = torch.arange(targets.shape[1], device=targets.device)
    belongs = (targets.argmax(1, keepdim=True) == classes) & counts  # [B, K]
    n = belongs.sum(0)  # [K]
    distances = []
    for (sample_means, sample_variances), running_mean, running_variance in zip(moments, means, variances, strict=True):
        belonging = belongs.to(sample_means.dtype)
        share = (belonging / n.clamp(min=1)).T  # [K, B]
        ours, within = torch.where(counts, sample_means, 0), torch.where(counts, sample_variances, 0)  # [B, C]
        mean = share @ ours  # [K, C]
        away = torch.where(counts, ours - belonging @ mean, 0)
        variance = share @ (within + away.square())
        distances.append(torch.linalg.vector_norm(mean - running_mean, dim=1))
        distances.append(torch.linalg.vector_norm(variance - running_variance, dim=1))
    terms = torch.stack(distances)  # [2 L, K]
    of_class = (terms if factors is None else terms * factors.flatten()[:, None]).sum(0)
    present = n > 0
    return torch.where(present, of_class, 0).sum() / present.sum().clamp(min=1)
