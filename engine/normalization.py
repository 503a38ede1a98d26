"""Normalizations and the gradients of what they normalize, for tracing; statistics in float32 at least."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import native_batch_norm_backward, native_group_norm_backward

from diffdfkd.kernels.launch import at_least_float32

aten = torch.ops.aten


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1/sqrt(variance + eps), each its own operators: TensorRT takes no norm of several outputs."""
    dimensions = list(range(-len(shape), 0))
    wide = at_least_float32(x)
    mean = wide.mean(dimensions, keepdim=True)
    centered = wide - mean
    scale = torch.rsqrt((centered * centered).mean(dimensions, keepdim=True) + eps)
    made = centered * scale
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
    """Of x alone: scale (g - mean(g) - n mean(g n)), g the gradient of the normalized n."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    dimensions = list(range(-len(shape), 0))
    normal = (at_least_float32(x) - mean) * scale
    inner = at_least_float32(gradient)
    if weight is not None:
        inner = inner * weight
    shared = inner.mean(dimensions, keepdim=True)
    along = (inner * normal).mean(dimensions, keepdim=True)
    return (scale * (inner - shared - normal * along)).to(x.dtype), None, None


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
    """In eval mode the operator that knows no other."""
    if training or running_mean is None or running_variance is None:
        return NotImplemented
    return aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_variance, momentum, eps)


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
    """Of x alone; with a batch's own statistics, as instance normalization has them, core ATen's."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    if training or running_variance is None:
        return native_batch_norm_backward(
            gradient, x, weight, running_mean, running_variance, mean, scale, training, eps, [*wanted]
        )
    factor = torch.rsqrt(at_least_float32(running_variance) + eps)
    if weight is not None:
        factor = factor * weight
    return (gradient * factor.reshape(-1, *[1] * (x.dim() - 2))).to(x.dtype), None, None
