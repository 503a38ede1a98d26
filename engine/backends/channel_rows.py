"""Group normalization of channels_last activations by rows, for compilers that vectorize the innermost dimension.

With channels last a loop over 12 or 24 channels fills no vector of 16. Seen as [N, H, W C], an activation has loops
of W C elements, so statistics are summed over H first, and what a channel or a group shares is spread over a row by a
product with a matrix of zeros and ones: the product is a buffer, where an index into C would be vectorized no better
than before. Statistics are float32, or wider. On the demo's guidance chain in bfloat16 this is worth a fifth of the
time (docs/engines.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.decompositions import decompositions
from diffdfkd.kernels.launch import at_least_float32

LANES = 16
"""float32 values in a vector of 512 bits."""

aten = torch.ops.aten


def row_norms() -> dict[Any, Callable[..., Any]]:
    """Decompositions of group normalization where the channels fill no whole vectors; others as they were."""
    return {aten.native_group_norm.default: group_norm, aten.native_group_norm_backward.default: group_norm_backward}


def by_rows(x: Tensor, channels: int) -> bool:
    """Whether the activation is worth the detour."""
    return x.dim() == 4 and channels % LANES != 0


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> Any:
    """(normalized [N, C, H, W], mean [N, G], 1/sqrt(variance + eps) [N, G]), as `aten.native_group_norm`."""
    if not by_rows(x, channels):
        return NotImplemented
    rows, spread = _rows(x), _spread(x, groups)
    count = channels // groups * positions
    mean = rows.sum(1) @ spread / count
    centered = rows - (mean @ spread.t())[:, None]
    variance = (centered * centered).sum(1) @ spread / count
    scale = torch.rsqrt(variance + eps)
    row_scale = scale @ spread.t()
    if weight is not None:
        row_scale = row_scale * _along(weight, x)
    made = (rows - (mean @ spread.t())[:, None]) * row_scale[:, None]
    if bias is not None:
        made = made + _along(bias, x)
    return _activation(made, x), mean, scale


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
    """Of x alone: scale (g - mean(g) - n mean(g n)), g the gradient of the normalized n, means over a group."""
    if wanted[1] or wanted[2] or not by_rows(x, channels):
        plain = decompositions()[aten.native_group_norm_backward.default]
        return plain(gradient, x, mean, scale, weight, batch, channels, positions, groups, wanted)
    rows, inner, spread = _rows(x), _rows(gradient), _spread(x, groups)
    count = channels // groups * positions
    mean, scale = mean.to(rows.dtype), scale.to(rows.dtype)
    if weight is not None:
        inner = inner * _along(weight, x)
    centered = rows - (mean @ spread.t())[:, None]
    # Both sums as one product, there and back: products this small cost what their calls cost.
    shared, along = (torch.cat([inner.sum(1), (inner * centered).sum(1)]) @ spread / count).chunk(2)
    shared, along = (torch.cat([shared, along * scale * scale]) @ spread.t()).chunk(2)
    made = inner - shared[:, None] - centered * along[:, None]
    return _activation(made * (scale @ spread.t())[:, None], x), None, None


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W C], in float32 at least; of a channels_last activation a view."""
    batch, channels, height, width = x.shape
    return at_least_float32(x.permute(0, 2, 3, 1).reshape(batch, height, width * channels))


def _activation(rows: Tensor, x: Tensor) -> Tensor:
    """The way back, in the dtype of x."""
    batch, channels, height, width = x.shape
    return rows.to(x.dtype).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _spread(x: Tensor, groups: int) -> Tensor:
    """[W C, G]: 1 where an element of a row belongs to a group."""
    channels, width = x.shape[1], x.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_channel = torch.eye(groups, dtype=dtype, device=x.device).repeat_interleave(channels // groups, 0)
    return of_channel.repeat(width, 1)


def _along(vector: Tensor, x: Tensor) -> Tensor:
    """[C] -> [W C]."""
    return at_least_float32(vector).repeat(x.shape[3])
