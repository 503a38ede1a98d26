"""Max pooling's gradient without indices: comparisons of a window's places, and an interleaving of planes.

A window's gradient goes to the first of its largest values in row-major order, as in torch. The place (i, j) of the
window with its corner at (s u, s v) is row s u + d i, column s v + d j of the padded input (stride s, dilation d). With
d i = s a + r and d j = s b + q, places of equal (r, q) add up on the windows' own grid, shifted by (a, b); the s x s
sums are then interleaved.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from diffdfkd.engine.separable import pair, whole_factors

aten = torch.ops.aten


class Windows(NamedTuple):
    """Where the windows lie; numbers by rows and by columns."""

    sizes: list[int]
    """Of the input."""
    out: list[int]
    stride: list[int]
    padding: list[int]
    offsets: list[tuple[int, int]]
    """Of a window's places from its corner, in row-major order."""


def max_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor | None = None,
) -> Tensor:
    """Gradient of the output [..., H', W'] -> of x [..., H, W]; H and W are numbers, what is before them is free."""
    extents, steps = pair(kernel), pair(dilation)
    windows = Windows(
        sizes=[int(size) for size in x.shape[-2:]],
        out=[int(size) for size in gradient.shape[-2:]],
        stride=pair(stride or kernel),
        padding=pair(padding),
        offsets=[(i * steps[0], j * steps[1]) for i, j in product(range(extents[0]), range(extents[1]))],
    )
    return _scattered(_shares(gradient, _gathered(x, windows)), windows)


def _gathered(x: Tensor, windows: Windows) -> list[Tensor]:
    """[..., H', W'] for each place of a window; what lies outside of x is -inf."""
    sizes, out, stride, padding, offsets = windows
    reach = [s * (n - 1) + last + 1 for s, n, last in zip(stride, out, offsets[-1], strict=True)]
    beyond = [max(0, end - size - p) for end, size, p in zip(reach, sizes, padding, strict=True)]
    if any(padding + beyond):
        x = aten.constant_pad_nd(x, [padding[1], beyond[1], padding[0], beyond[0]], float("-inf"))
    ends = [s * (n - 1) + 1 for s, n in zip(stride, out, strict=True)]
    return [
        aten.slice(aten.slice(x, -2, top, top + ends[0], stride[0]), -1, left, left + ends[1], stride[1])
        for top, left in offsets
    ]


def _shares(gradient: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """What of the gradient goes to each place: all of it to the first largest value, which nothing later exceeds."""
    largest, exceeds = values[0], []
    for value in values[1:]:
        exceeds.append(value > largest)
        largest = torch.maximum(largest, value)
    zero = torch.zeros_like(gradient)
    exceeded: Tensor | None = None
    shares = []
    # From the last place on: the last that exceeds all before it is the first largest.
    for mine in reversed(exceeds):
        shares.append(torch.where(mine if exceeded is None else mine & ~exceeded, gradient, zero))
        exceeded = mine if exceeded is None else mine | exceeded
    shares.append(gradient if exceeded is None else torch.where(exceeded, zero, gradient))
    return shares[::-1]


def _scattered(shares: Sequence[Tensor], windows: Windows) -> Tensor:
    """[..., H, W]: the sum of the shares, each at its place of every window."""
    sizes, out, stride, padding, offsets = windows
    farthest = [last // s for last, s in zip(offsets[-1], stride, strict=True)]
    planes: dict[tuple[int, int], Tensor] = {}
    for share, (top, left) in zip(shares, offsets, strict=True):
        (a, r), (b, q) = divmod(top, stride[0]), divmod(left, stride[1])
        if any(farthest):
            share = aten.constant_pad_nd(share, [b, farthest[1] - b, a, farthest[0] - a])
        planes[r, q] = planes[r, q] + share if (r, q) in planes else share
    empty = torch.zeros_like(planes[0, 0])
    height, width = (s * (n + more) for s, n, more in zip(stride, out, farthest, strict=True))
    batch = shares[0].shape[:-2]
    rows = [
        _interleaved([planes.get((r, q), empty) for q in range(stride[1])], -1, [*batch, height // stride[0], width])
        for r in range(stride[0])
    ]
    made = _interleaved(rows, -2, [*batch, height, width])
    after = [size + p - n for size, p, n in zip(sizes, padding, (height, width), strict=True)]
    return aten.constant_pad_nd(made, [-padding[1], after[1], -padding[0], after[0]])


def _interleaved(parts: Sequence[Tensor], dimension: int, shape: Sequence[int]) -> Tensor:
    """[..., n, ...], s times -> [..., s n, ...]: the first elements of all parts, then the second ones."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([*parts], dim=-1).reshape(shape) if dimension == -1 else torch.stack([*parts], -2).reshape(shape)


def adaptive_max_pool(x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Max pooling where the sizes divide; else the operator itself, which engines lack."""
    factors = whole_factors(size, x.shape[-2:])
    return NotImplemented if factors is None else aten.max_pool2d_with_indices(x, factors, factors)


def adaptive_max_pool_backward(gradient: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    factors = whole_factors(gradient.shape[-2:], x.shape[-2:])
    return NotImplemented if factors is None else max_pool_backward(gradient, x, factors, factors, [0], [1], False)
