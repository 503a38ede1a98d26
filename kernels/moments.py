"""Moments of BatchNorm inputs: mean and biased variance per channel, over space and the samples of weight 1.

    mean     = sum_i x_i / n
    variance = sum_i (x_i - mean)^2 / n
    merged:    mean_a + delta n_b / n,   S_a + S_b + delta^2 n_a n_b / n      (delta = mean_b - mean_a, S = n variance)

The last line is of Chan, Golub and LeVeque (1979). The activation is read once. A program takes a run of positions of a
sample: with c the mean of its first tile, sums of x - c and (x - c)^2 give the run's mean and scatter S. A part of the
run, the tile bounds |c - mean| by the run's standard deviation times the root of run / tile: little cancels, however
large the mean. A second kernel merges the runs, always in the same order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from diffdfkd.kernels.launch import Kernel, Launch, at_least_float32, blocks, power_of_two


class Moments(NamedTuple):
    """What is known of L layers' inputs after any number of micro-batches; of several processes: `merge_moments`."""

    samples: Tensor
    """[] int64, how many had weight 1."""
    means: list[Tensor]
    """L of [C], float32 or wider; zeros where no sample counted."""
    variances: list[Tensor]
    """L of [C], biased."""


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
        # Joined, so that a compiler keeps them as buffers and does not work them out again at every position; not along
        # the batch, which TensorRT does not split where it is free.
        both = torch.stack([by_mean, 2 * by_variance]) / activation[0, 0].numel()
        return torch.addcmul(both[0], activation - mean, both[1])


def sample_moments_reference(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample, two of [B, C] in float32 or wider."""
    activation = at_least_float32(activation)
    if activation.dim() == 2:
        activation = activation[:, :, None]
    means, variances = SampleMoments.apply(activation)
    return means, variances


def batch_moments_reference(activation: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    means, variances = sample_moments_reference(activation)  # [B, C]
    counts = (weight > 0)[:, None]
    n = counts.sum().clamp(min=1)
    # Masked before anything is shared: a NaN would come back to every sample through the gradient of the mean.
    means, variances = torch.where(counts, means, 0), torch.where(counts, variances, 0)
    mean = means.sum(0) / n
    # Variance of the whole from the variance within and between samples.
    variance = (variances + torch.where(counts, means - mean, 0).square()).sum(0) / n
    return mean, variance


@triton.jit
def _moments_kernel(
    x,  # [B, C, P] or [B, P, C]
    counted,  # [B] bool
    means,  # [R, C] float32, R = B * splits
    scatters,  # [R, C] float32
    channels,
    positions,
    splits,
    CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    channels, positions = aligned_sizes(channels, positions, CHANNELS_LAST, ALIGNED)
    row, sample, first_p, first_c = program_place(channels, splits, CHUNKS * BLOCK_P, BLOCK_C)
    # A row that does not count is neither read nor written.
    if tl.load(counted + sample) != 0:
        p = first_p + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1]
        c = first_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        at = x + sample * channels * positions
        at += tile_offsets(first_p, first_c, channels, positions, BLOCK_P, BLOCK_C, CHANNELS_LAST)  # [BLOCK_P, BLOCK_C]
        step = BLOCK_P * channels if CHANNELS_LAST else BLOCK_P
        known = (c < channels)[None, :]
        inside = known & (p < positions)
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        center = tl.sum(values, 0) / tl.minimum(positions - first_p, BLOCK_P).to(tl.float32)  # [BLOCK_C]
        distances = tl.where(inside, values - center[None, :], 0.0)
        sums, squares = distances, distances * distances
        for _ in range(1, CHUNKS):
            at += step
            p += BLOCK_P
            inside = known & (p < positions)
            values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            distances = tl.where(inside, values - center[None, :], 0.0)
            sums += distances
            squares += distances * distances
        n = tl.minimum(positions - first_p, CHUNKS * BLOCK_P).to(tl.float32)
        total = tl.sum(sums, 0)
        scatter = tl.sum(squares, 0) - total * total / n
        out = row * channels + c
        tl.store(means + out, center + total / n, mask=c < channels)
        tl.store(scatters + out, scatter, mask=c < channels)


@triton.jit
def _merged(n_a, mean_a, scatter_a, n_b, mean_b, scatter_b):
    """Count, mean and scatter (sum of squared distances from the mean) of two groups; either may be empty."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    delta = mean_b - mean_a
    return n, mean_a + share * delta, scatter_a + scatter_b + delta * delta * (n_a * share)


@triton.jit
def _combine_kernel(
    means,  # [R, C] float32
    scatters,  # [R, C] float32
    counted,  # [B] bool
    samples_before,  # [] int64 or None
    mean_before,  # [C] or None
    variance_before,  # [C] or None
    running_mean,  # [C] or None
    running_variance,  # [C] or None
    mean_out,  # [C] float32
    variance_out,  # [C] float32
    differences,  # [2, width] float32 or None
    rows,
    channels,
    positions,
    splits,
    width,
    RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    known = c < channels
    n = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    scatter = tl.zeros([BLOCK_C], tl.float32)
    if samples_before is not None:
        n += tl.load(samples_before).to(tl.float32) * positions
        mean += tl.load(mean_before + c, mask=known, other=0.0).to(tl.float32)
        scatter += tl.load(variance_before + c, mask=known, other=0.0).to(tl.float32) * n
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        counts = tl.load(counted + row // splits, mask=row < rows, other=0) != 0
        sizes = tl.where(counts, tl.minimum(positions - row % splits * RUN, RUN), 0).to(tl.float32)
        inside = counts[:, None] & known[None, :]
        at = row.to(tl.int64)[:, None] * channels + c[None, :]  # [BLOCK_R, BLOCK_C]
        centers = tl.load(means + at, mask=inside, other=0.0)
        within = tl.load(scatters + at, mask=inside, other=0.0)
        n_tile = tl.sum(sizes)
        mean_tile = tl.sum(sizes[:, None] * centers, 0) / tl.maximum(n_tile, 1.0)
        distances = tl.where(inside, centers - mean_tile[None, :], 0.0)
        scatter_tile = tl.sum(within + sizes[:, None] * distances * distances, 0)
        n, mean, scatter = _merged(n, mean, scatter, n_tile, mean_tile, scatter_tile)
    # Rounding may leave a constant channel a little below 0; a comparison, unlike a maximum, lets NaN through.
    variance = tl.where(scatter < 0.0, 0.0, scatter / tl.maximum(n, 1.0))
    tl.store(mean_out + c, mean, mask=known)
    tl.store(variance_out + c, variance, mask=known)
    if differences is not None:
        # Behind the last channel all terms are 0; where no sample counts the distance is.
        by_mean = mean - tl.load(running_mean + c, mask=known, other=0.0).to(tl.float32)
        by_variance = variance - tl.load(running_variance + c, mask=known, other=0.0).to(tl.float32)
        tl.store(differences + c, tl.where(n > 0.0, by_mean, 0.0), mask=c < width)
        tl.store(differences + width + c, tl.where(n > 0.0, by_variance, 0.0), mask=c < width)


def moments_launch(activation: Tensor, counted: Tensor) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """From [B, C, ...] and bool [B], per run of a sample: means and scatters, float32 [B * splits, C]."""
    cut = activation_tiling(activation)
    rows = len(activation) * cut.splits
    means = torch.empty(rows, cut.channels, dtype=torch.float32, device=activation.device)
    scatters = torch.empty_like(means)
    arguments = {
        "x": activation,
        "counted": counted,
        "means": means,
        "scatters": scatters,
        "channels": cut.channels,
        "positions": cut.positions,
        "splits": cut.splits,
    }
    constants = {"CHUNKS": cut.chunks, **cut.constants}
    return Launch(_moments_kernel, (rows * cut.channel_blocks,), arguments, constants, cut.warps), (means, scatters)


def combine_launch(
    activation: Tensor,
    runs: tuple[Tensor, Tensor],
    counted: Tensor,
    before: tuple[Tensor, Tensor, Tensor] | None = None,
    running: tuple[Tensor, Tensor] | None = None,
    differences: Tensor | None = None,
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """Mean and variance float32 [C] of an activation from those of its runs, merged with those of earlier samples.

    ``before`` is their number int64 [], mean and variance [C]. How far ours are from ``running`` mean and variance [C]
    is written to ``differences`` [2, width], zeros behind C.
    """
    cut = activation_tiling(activation)
    rows, width = len(runs[0]), cut.channels if differences is None else differences.shape[1]
    mean = torch.empty(cut.channels, dtype=torch.float32, device=activation.device)
    variance = torch.empty_like(mean)
    # Eight channels are a sector of memory; few rows leave room for more of them.
    block_r = min(256, power_of_two(rows))
    block_c = min(64, max(8, 1024 // block_r))
    arguments = {
        "means": runs[0],
        "scatters": runs[1],
        "counted": counted,
        "samples_before": before[0] if before is not None else None,
        "mean_before": before[1] if before is not None else None,
        "variance_before": before[2] if before is not None else None,
        "running_mean": running[0] if running is not None else None,
        "running_variance": running[1] if running is not None else None,
        "mean_out": mean,
        "variance_out": variance,
        "differences": differences,
        "rows": rows,
        "channels": cut.channels,
        "positions": cut.positions,
        "splits": cut.splits,
        "width": width,
    }
    constants = {"RUN": cut.chunks * cut.block_p, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return Launch(_combine_kernel, (blocks(width, block_c),), arguments, constants, 4), (mean, variance)


def moments_by_kernel(
    inputs: Sequence[Tensor],
    counted: Tensor,
    before: Moments | None = None,
    running: Sequence[tuple[Tensor, Tensor]] | None = None,
    differences: Tensor | None = None,
) -> Moments:
    """Two launches a layer; ``running`` and ``differences`` [L, 2, width] as in `combine_launch`."""
    samples, means, variances = counted.sum(), [], []
    for index, activation in enumerate(inputs):
        launch, runs = moments_launch(activation, counted)
        launch.run()
        launch, (mean, variance) = combine_launch(
            activation,
            runs,
            counted,
            (before.samples, before.means[index], before.variances[index]) if before is not None else None,
            running[index] if running is not None else None,
            differences[index] if differences is not None else None,
        )
        launch.run()
        means.append(mean)
        variances.append(variance)
    return Moments(samples if before is None else before.samples + samples, means, variances)


def batch_moments(activation: Tensor, weight: Tensor, *, kernel: Kernel = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, over space and the samples of weight 1: [B, C, ...], [B] -> [C], [C].

    Float32 or wider; all zero where no sample has weight 1. The reference can be differentiated, the kernel's moments
    carry no graph. Raises ValueError for what does not fit together.
    """
    if settle_inputs({"activation": activation}, weight, kernel) == "reference":
        return batch_moments_reference(activation, weight)
    _, (mean,), (variance,) = moments_by_kernel([activation.detach()], counted_samples(weight))
    return mean, variance


@torch.no_grad()
def accumulate_moments(
    inputs: Sequence[Tensor], weight: Tensor, before: Moments | None = None, *, kernel: Kernel = "auto"
) -> Moments:
    """Moments of the samples of weight 1 of a micro-batch, and of those ``before``; no graph.

    ``inputs`` [B, C, ...] are those of L layers, each with as many positions as in the micro-batches before. Raises
    ValueError for what does not fit together.
    """
    form = settle_inputs(named_layers(inputs), weight, kernel)
    if before is not None:
        check_vectors(inputs, weight.device, means=before.means, variances=before.variances)
    if form == "triton":
        return moments_by_kernel(inputs, counted_samples(weight), before)
    pairs = [batch_moments_reference(activation, weight) for activation in inputs]
    now = Moments((weight > 0).sum(), [mean for mean, _ in pairs], [variance for _, variance in pairs])
    return now if before is None else merge_moments(before, now)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the samples of both, such as those of two processes, of equally many positions per sample.

    Processes that gather each other's moments and merge them in the order of their ranks have the same ones.
    """
    samples = a.samples + b.samples
    means, variances = [], []
    for mean_a, variance_a, mean_b, variance_b in zip(a.means, a.variances, b.means, b.variances, strict=True):
        share = b.samples.to(mean_a.dtype) / samples.clamp(min=1)
        delta = mean_b - mean_a
        means.append(mean_a + share * delta)
        variances.append(variance_a + share * (variance_b - variance_a) + share * (1 - share) * delta.square())
    return Moments(samples, means, variances)
