"""Normalizations and the gradients of what they normalize, for tracing; statistics in float32 at least."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import native_group_norm_backward

from diffdfkd.kernels.launch import at_least_float32

aten = torch.ops.aten


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1/sqrt(variance + eps), each its own operators: TensorRT takes no norm of several outputs."""
    made, mean, scale = _normalized(x, list(range(-len(shape), 0)), eps)
    if weight is not None:
        made = made * weight
    if bias is not None:
        made = made + bias
    return made.to(x.dtype), mean, scale


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> Any:
    """Of x alone."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    inner = at_least_float32(gradient)
    if weight is not None:
        inner = inner * weight
    return _by_x(inner, x, mean, scale, list(range(-len(shape), 0))), None, None


def _normalized(x: Tensor, dimensions: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """n = (x - mean) scale, the mean over the dimensions, which stay, and the scale = 1/sqrt(variance + eps)."""
    wide = at_least_float32(x)
    mean = wide.mean(dimensions, keepdim=True)
    centered = wide - mean
    scale = torch.rsqrt((centered * centered).mean(dimensions, keepdim=True) + eps)
    return centered * scale, mean, scale


def _by_x(inner: Tensor, x: Tensor, mean: Tensor, scale: Tensor, dimensions: list[int]) -> Tensor:
    """scale (g - mean(g) - n mean(g n)), g the gradient of n."""
    normal = (at_least_float32(x) - mean) * scale
    shared = inner.mean(dimensions, keepdim=True)
    along = (inner * normal).mean(dimensions, keepdim=True)
    return (scale * (inner - shared - normal * along)).to(x.dtype)


def group_norm_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    batch: int,
    channels: int,
    positions: int,
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """Of x alone: core ATen's, in float32 at least."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    # Their derivation has the fewest passes over x, and the cancellations of torch's own kernel.
    given = map(at_least_float32, (gradient, x, mean, scale))
    made, _, _ = native_group_norm_backward(*given, weight, batch, channels, positions, groups, [True, False, False])
    return made.to(x.dtype), None, None


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """In eval mode the operator that knows no other; without memory, as instance normalization is, spelled out."""
    if not training and running_mean is not None and running_variance is not None:
        return aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_variance, momentum, eps)
    if running_mean is not None or running_variance is not None:
        return NotImplemented
    return batch_norm_without_memory(x, weight, bias, training, momentum, eps)


def batch_norm_without_memory(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the batch's own statistics: output, mean [C] and 1/sqrt(variance + eps) [C]."""
    dimensions = _but_channels(x)
    made, mean, scale = _normalized(x, dimensions, eps)
    if weight is not None:
        made = made * _by_channel(weight, x)
    if bias is not None:
        made = made + _by_channel(bias, x)
    return made.to(x.dtype), mean.squeeze(dimensions), scale.squeeze(dimensions)


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    """Of x alone."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    if not training and running_variance is not None:
        factor = torch.rsqrt(at_least_float32(running_variance) + eps)
        factor = factor if weight is None else factor * weight
        return (gradient * _by_channel(factor, x)).to(x.dtype), None, None
    if mean is None or scale is None:
        return NotImplemented
    inner = at_least_float32(gradient)
    if weight is not None:
        inner = inner * _by_channel(weight, x)
    return _by_x(inner, x, _by_channel(mean, x), _by_channel(scale, x), _but_channels(x)), None, None


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...] beside x."""
    return values.reshape(1, values.shape[0], *[1] * (x.dim() - 2))
