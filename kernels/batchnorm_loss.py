"""L_bn: distance of BatchNorm inputs from the statistics that the layers remember (DeepInversion, Yin et al., 2020).

    L_bn         = sum over layers of a |mean - running mean|_2 + b |variance - running variance|_2   (biased variance)
    dL_bn / dx_i = [ by_mean + 2 (x_i - mean) by_variance ] / n         by_mean = a (mean - running mean) / |...|_2

with moments over space and the samples of weight 1 (kernels/moments.py), n their elements per channel, by_variance as
by_mean, and factors a, b of each layer, 1 by default; where a distance is 0 its derivative is 0. Each input is read
once forward, and once backward, where its gradient is written. Mean and variance enter the gradient as constants, so
that it can be taken in micro-batches:

    moments  = accumulate_moments(inputs, weight, moments)            of every micro-batch, without a graph
    distance = batchnorm_distance(moments, running_means, running_variances)
    held_loss(inputs, weight, moments, distance).backward()           of every micro-batch again

gives the gradient of one large batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffdfkd.kernels.activation import (
    activation_tiling,
    aligned_sizes,
    check_vectors,
    counted_samples,
    named_layers,
    program_place,
    settle_inputs,
    tile_offsets,
)
from diffdfkd.kernels.launch import Kernel, Launch, blocks
from diffdfkd.kernels.moments import (
    Moments,
    batch_moments_reference,
    moments_by_kernel,
    sample_moments_reference,
)


class Distance(NamedTuple):
    """L_bn of some moments, and its derivatives with respect to them."""

    loss: Tensor
    """[], 0 where no sample counted."""
    by_mean: list[Tensor]
    """L of [C]."""
    by_variance: list[Tensor]
    """L of [C]."""


def batchnorm_loss_reference(
    inputs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weight: Tensor,
    factors: Tensor | None = None,
) -> Tensor:
    terms = []
    for activation, running_mean, running_variance in zip(inputs, means, variances, strict=True):
        mean, variance = batch_moments_reference(activation, weight)
        terms.append(torch.linalg.vector_norm(mean - running_mean))
        terms.append(torch.linalg.vector_norm(variance - running_variance))
    norms = torch.stack(terms)  # [2 L]
    return torch.where((weight > 0).any(), (norms if factors is None else norms * factors.flatten()).sum(), 0)


def held_loss_reference(inputs: Sequence[Tensor], weight: Tensor, moments: Moments, distance: Distance) -> Tensor:
    counts = (weight > 0)[:, None]
    n = moments.samples.clamp(min=1)
    terms = []
    layers = zip(inputs, moments.means, distance.by_mean, distance.by_variance, strict=True)
    for activation, mean, by_mean, by_variance in layers:
        means, variances = sample_moments_reference(activation)  # [B, C]
        means, away = torch.where(counts, means, 0), torch.where(counts, means - mean, 0)
        variances = torch.where(counts, variances, 0) + away.square()
        terms.append((by_mean * means).sum() + (by_variance * variances).sum())
    gradient_alone = torch.stack(terms).sum() / n
    return distance.loss * (counts.sum() / n) + (gradient_alone - gradient_alone.detach())


@triton.jit
def _distance_kernel(
    differences,  # [rows, width] float32; becomes the derivative of each row's norm times its factor
    factors,  # [rows] float32, or None for ones
    norms,  # [rows] float32
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = differences + row.to(tl.int64) * width
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        values = tl.load(at + c, mask=c < width, other=0.0)
        squares += values * values
    norm = tl.sqrt(tl.sum(squares))
    # All values of a norm of 0 are 0, and so is what becomes of them.
    scale = 1.0 / tl.where(norm == 0.0, 1.0, norm)
    if factors is not None:
        factor = tl.load(factors + row)
        norm *= factor
        scale *= factor
    tl.store(norms + row, norm)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        values = tl.load(at + c, mask=c < width, other=0.0)
        tl.store(at + c, values * scale, mask=c < width)


@triton.jit
def _batchnorm_gradient_kernel(
    x,  # [B, C, P] or [B, P, C]
    gradient,  # as x
    counted,  # [B] bool
    samples,  # [] int64
    mean,  # [C]
    by_mean,  # [C]
    by_variance,  # [C]
    upstream,  # [] float32
    channels,
    positions,
    splits,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    channels, positions = aligned_sizes(channels, positions, CHANNELS_LAST, ALIGNED)
    _, sample, first_p, first_c = program_place(channels, splits, BLOCK_P, BLOCK_C)
    p = first_p + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1]
    c = first_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    at = sample * channels * positions
    at += tile_offsets(first_p, first_c, channels, positions, BLOCK_P, BLOCK_C, CHANNELS_LAST)  # [BLOCK_P, BLOCK_C]
    known = c < channels
    inside = known[None, :] & (p < positions)
    made = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # A sample that does not count is not read: zero times its NaN would be NaN.
    if tl.load(counted + sample) != 0:
        share = tl.load(upstream).to(tl.float32) / (tl.load(samples).to(tl.float32) * positions)
        center = tl.load(mean + c, mask=known, other=0.0).to(tl.float32)
        offset = share * tl.load(by_mean + c, mask=known, other=0.0).to(tl.float32)
        slope = 2.0 * share * tl.load(by_variance + c, mask=known, other=0.0).to(tl.float32)
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        made = offset[None, :] + (values - center[None, :]) * slope[None, :]
    tl.store(gradient + at, made.to(gradient.dtype.element_ty), mask=inside)


def distance_launch(differences: Tensor, factors: Tensor | None = None) -> tuple[Launch, Tensor]:
    """Norms float32 [rows] of the rows [rows, width], times their float32 ``factors`` [rows].

    The rows are overwritten with the derivatives of what is returned.
    """
    rows, width = differences.shape
    norms = torch.empty(rows, dtype=torch.float32, device=differences.device)
    arguments = {"differences": differences, "factors": factors, "norms": norms, "width": width}
    return Launch(_distance_kernel, (rows,), arguments, {"BLOCK": 1024}, 4), norms


def gradient_launch(
    activation: Tensor,
    counted: Tensor,
    samples: Tensor,
    mean: Tensor,
    by_mean: Tensor,
    by_variance: Tensor,
    upstream: Tensor,
) -> tuple[Launch, Tensor]:
    """``upstream`` [] times the derivative with respect to [B, C, ...], in its dtype and memory format.

    Of all ``samples`` int64 [] whose ``mean`` [C] and derivatives these are, the activation holds those ``counted``.
    """
    cut = activation_tiling(activation)
    splits = blocks(cut.positions, cut.block_p)
    gradient = torch.empty_like(activation)
    arguments = {
        "x": activation,
        "gradient": gradient,
        "counted": counted,
        "samples": samples,
        "mean": mean,
        "by_mean": by_mean,
        "by_variance": by_variance,
        "upstream": upstream,
        "channels": cut.channels,
        "positions": cut.positions,
        "splits": splits,
    }
    grid = (len(activation) * splits * cut.channel_blocks,)
    return Launch(_batchnorm_gradient_kernel, grid, arguments, cut.constants, cut.warps), gradient


class HeldLoss(torch.autograd.Function):
    """A share of a distance as a function of the inputs: moments and derivatives are held fixed."""

    @staticmethod
    def forward(
        ctx: Any, counted: Tensor, moments: Moments, distance: Distance, share: Tensor | float, *inputs: Tensor
    ) -> Tensor:
        ctx.counted, ctx.moments, ctx.distance = counted, moments, distance
        ctx.save_for_backward(*inputs)
        return distance.loss * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = []
        layers = zip(ctx.saved_tensors, ctx.moments.means, ctx.distance.by_mean, ctx.distance.by_variance, strict=True)
        for wanted, (activation, mean, by_mean, by_variance) in zip(ctx.needs_input_grad[4:], layers, strict=True):
            if not wanted:
                gradients.append(None)
                continue
            launch, gradient = gradient_launch(
                activation, ctx.counted, ctx.moments.samples, mean, by_mean, by_variance, upstream
            )
            launch.run()
            gradients.append(gradient)
        return None, None, None, None, *gradients


@torch.no_grad()
def distance_by_kernel(
    inputs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    counted: Tensor,
    factors: Tensor | None = None,
) -> tuple[Moments, Distance]:
    """2 L + 1 launches, and one of torch that sums the norms."""
    # Rows of one width are taken by one launch; a multiple of 16 keeps each of them aligned.
    width = 16 * blocks(max(activation.shape[1] for activation in inputs), 16)
    differences = torch.empty(len(inputs), 2, width, dtype=torch.float32, device=counted.device)
    moments = moments_by_kernel(
        inputs, counted, running=list(zip(means, variances, strict=True)), differences=differences
    )
    launch, norms = distance_launch(differences.flatten(0, 1), None if factors is None else factors.flatten().float())
    launch.run()
    rows = [row[:, : len(mean)] for row, mean in zip(differences, moments.means, strict=True)]
    return moments, Distance(norms.sum(), [row[0] for row in rows], [row[1] for row in rows])


def batchnorm_loss(
    inputs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weight: Tensor,
    factors: Tensor | None = None,
    *,
    kernel: Kernel = "auto",
) -> Tensor:
    """L_bn: sum over layers of |mean - running mean|_2 + |variance - running variance|_2, in float32 or wider.

    ``inputs`` are the BatchNorm layers' inputs [B, C, ...], contiguous or channels_last, ``means`` and ``variances``
    their running statistics [C], ``weight`` [B] is 0 or 1; 0 where no sample has weight 1. ``factors`` [L, 2] of each
    layer's two distances, constants, are 1 by default. It can be differentiated
    once, in the inputs; a sample of weight 0 gets gradient 0 (of the reference NaN, where it holds NaN). Raises
    ValueError, before anything is launched, for what does not fit together.
    """
    form = settle_inputs(named_layers(inputs), weight, kernel)
    check_vectors(inputs, weight.device, means=means, variances=variances)
    check_factors(factors, len(inputs), weight.device)
    if form == "reference":
        return batchnorm_loss_reference(inputs, means, variances, weight, factors)
    counted = counted_samples(weight)
    moments, distance = distance_by_kernel(inputs, means, variances, counted, factors)
    loss: Tensor = HeldLoss.apply(counted, moments, distance, 1.0, *inputs)
    return loss


def check_factors(factors: Tensor | None, layers: int, device: torch.device) -> None:
    """Raises ValueError unless there are none, or two for each layer, on its device."""
    if factors is not None and (factors.shape != (layers, 2) or factors.device != device):
        raise ValueError(
            f"factors: got {tuple(factors.shape)} on {factors.device}; [{layers}, 2] on {device}, two for each layer"
        )


@torch.no_grad()
def batchnorm_distance(
    moments: Moments, means: Sequence[Tensor], variances: Sequence[Tensor], factors: Tensor | None = None
) -> Distance:
    """L_bn of accumulated moments from running statistics [C], and its derivatives: a few vectors, in plain torch.

    ``factors`` [L, 2] as those of `batchnorm_loss`.
    """
    norms: list[Tensor] = []
    derivatives: list[list[Tensor]] = []
    some = moments.samples > 0
    check_factors(factors, len(means), moments.samples.device)
    pairs = (("means", moments.means, means), ("variances", moments.variances, variances))
    for which, (name, ours, running) in enumerate(pairs):
        check_vectors([vector[None] for vector in ours], moments.samples.device, **{name: running})
        derivatives.append([])
        for layer, (vector, stored) in enumerate(zip(ours, running, strict=True)):
            difference = torch.where(some, vector - stored, 0)
            norm = torch.linalg.vector_norm(difference)
            derivative = torch.where(norm == 0, 0, difference / norm)
            factor = None if factors is None else factors[layer, which]
            norms.append(norm if factor is None else norm * factor)
            derivatives[-1].append(derivative if factor is None else derivative * factor)
    return Distance(torch.stack(norms).sum(), *derivatives)


def held_loss(
    inputs: Sequence[Tensor], weight: Tensor, moments: Moments, distance: Distance, *, kernel: Kernel = "auto"
) -> Tensor:
    """A micro-batch's part of L_bn, whose gradient is that part of the gradient of all micro-batches together.

    ``moments`` and ``distance`` are of all of them and are held fixed. The value is L_bn times the micro-batch's share
    of the samples: the parts add up to L_bn. Inputs, weight and errors as those of `batchnorm_loss`.
    """
    form = settle_inputs(named_layers(inputs), weight, kernel)
    check_vectors(
        inputs, weight.device, means=moments.means, by_mean=distance.by_mean, by_variance=distance.by_variance
    )
    if form == "reference":
        return held_loss_reference(inputs, weight, moments, distance)
    counted = counted_samples(weight)
    share = counted.sum() / moments.samples.clamp(min=1)
    loss: Tensor = HeldLoss.apply(counted, moments, distance, share, *inputs)
    return loss
