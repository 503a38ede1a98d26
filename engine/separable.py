"""Operators that are linear in rows and in columns apart - resizing, average pooling - as two matrix products.

    y = L x R^T        dL/dx = L^T (dL/dy) R        x [..., H, W], L [H', H], R [W', W]

L and R depend on sizes alone. They are read off the operator itself, applied to an identity in float64, and enter a
traced graph as constants, so that neither antialiased resizing nor a backward operator is left in it. Whole factors
need no matrix: repeating pixels and averaging blocks are each other's adjoint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

Along = tuple[OpOverload, int, tuple[Any, ...]]
"""An operator that acts on the rows of [1, 1, n, n] alone, n, and its further arguments."""

Decomposition = Callable[..., Any]
"""What stands in an operator's place; it returns NotImplemented where the operator is to stay."""


def linear(x: Tensor, rows: Along, columns: Along) -> Tensor:
    """[..., H, W] -> [..., H', W']."""
    return _product(x, rows, columns, adjoint=False)


def linear_backward(gradient: Tensor, rows: Along, columns: Along) -> Tensor:
    """[..., H', W'] -> [..., H, W]: from the gradient of `linear`'s output to that of its input."""
    return _product(gradient, rows, columns, adjoint=True)


def _product(x: Tensor, rows: Along, columns: Along, adjoint: bool) -> Tensor:
    # A matrix to the right of everything is one GEMM, whatever the batch.
    x = torch.matmul(x, _matrix(*columns, adjoint, x.dtype, x.device))
    return torch.matmul(x.transpose(-1, -2), _matrix(*rows, adjoint, x.dtype, x.device)).transpose(-1, -2)


@lru_cache(maxsize=128)
def _matrix(
    operator: OpOverload, size: int, arguments: tuple[Any, ...], adjoint: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[size, out], or [out, size] for the adjoint; a plain tensor even while a trace goes on."""
    arguments = tuple(list(argument) if isinstance(argument, tuple) else argument for argument in arguments)
    with outside_trace():
        matrix = operator(torch.eye(size, dtype=torch.float64, device="cpu")[None, None], *arguments)[0, 0]
        return (matrix if adjoint else matrix.t()).contiguous().to(device, dtype)


@contextmanager
def outside_trace() -> Iterator[None]:
    """What is computed here is plain tensors; a trace that goes on takes them as constants."""
    with _disable_current_modes(), no_python_dispatcher(), torch.inference_mode(False), torch.no_grad():
        yield


def repeat(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Each pixel of [B, C, H, W] as a block of factors[0] x factors[1]: an operator that every engine has."""
    height, width = (int(size) * factor for size, factor in zip(x.shape[-2:], factors, strict=True))
    return aten.upsample_nearest2d(x, [height, width], float(factors[0]), float(factors[1]))


def whole_factors(small: Sequence[int], large: Sequence[int]) -> list[int] | None:
    """How often the small sizes go into the large ones; None where they do not."""
    if any(big % little for little, big in zip(small, large, strict=True)):
        return None
    return [int(big) // int(little) for little, big in zip(small, large, strict=True)]


def resizing(operator: OpOverload) -> tuple[Decomposition, Decomposition]:
    """Forward and backward of ``upsample_<mode>2d`` (x, size, [align_corners,] scale, scale), antialiased or not."""
    nearest = "nearest" in operator.name()

    def along(size: int, out: int, corners: Sequence[bool], scale: float | None) -> Along:
        return operator, size, ((out, size), *corners, scale, None)

    def places(sizes: Sequence[int], out: Sequence[int], options: Sequence[Any]) -> tuple[Along, Along]:
        corners, scales = (options[:0], options) if nearest else (options[:1], options[1:])
        by_height, by_width = (*scales, None, None)[:2]
        height, width = map(int, sizes)
        return along(height, int(out[0]), corners, by_height), along(width, int(out[1]), corners, by_width)

    def whole(sizes: Sequence[int], out: Sequence[int], scales: Sequence[float | None]) -> list[int] | None:
        """The factors of repeated pixels; None for other modes, and where the factors are not whole."""
        factors = whole_factors(sizes, out) if nearest else None
        if factors and all(scale in (None, factor) for scale, factor in zip(scales, factors, strict=False)):
            return factors
        return None

    def forward(x: Tensor, size: Sequence[int], *options: Any) -> Tensor:
        factors = whole(x.shape[-2:], size, options)
        if factors is None:
            return linear(x, *places(x.shape[-2:], size, options))
        return NotImplemented if operator is aten.upsample_nearest2d.default else repeat(x, factors)

    def backward(gradient: Tensor, size: Sequence[int], x_size: Sequence[int], *options: Any) -> Tensor:
        factors = whole(x_size[-2:], size, options)
        if factors is None:
            return linear_backward(gradient, *places(x_size[-2:], size, options))
        return aten.avg_pool2d(gradient, factors, factors) * (factors[0] * factors[1])

    return forward, backward


def padding(operator: OpOverload) -> Decomposition:
    """Backward of ``reflection_pad2d`` or ``replication_pad2d``."""

    def backward(gradient: Tensor, x: Tensor, pad: Sequence[int]) -> Tensor:
        left, right, top, bottom = map(int, pad)
        height, width = map(int, x.shape[-2:])
        return linear_backward(
            gradient, (operator, height, ((0, 0, top, bottom),)), (operator, width, ((0, 0, left, right),))
        )

    return backward


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The operator itself, but where engines read its rarer options differently."""
    if not ceil_mode and divisor_override is None:
        return NotImplemented
    places = _windows(x.shape[-2:], kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return linear(x, *places) / (divisor_override or 1)


def average_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    kernel, stride, padding = pair(kernel), pair(stride or kernel), pair(padding)
    if kernel == stride == whole_factors(gradient.shape[-2:], x.shape[-2:]):
        return repeat(gradient / (divisor_override or kernel[0] * kernel[1]), kernel)
    places = _windows(x.shape[-2:], kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return linear_backward(gradient / (divisor_override or 1), *places)


def _windows(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[Along, Along]:
    """A window's divisor is the product of its extents in both dimensions; with one of its own it sums."""
    divisor = 1 if divisor_override else None
    rows, columns = (
        (aten.avg_pool2d.default, int(size), ((k, 1), (s, 1), (p, 0), ceil_mode, count_include_pad, divisor))
        for size, k, s, p in zip(sizes, pair(kernel), pair(stride or kernel), pair(padding), strict=True)
    )
    return rows, columns


def pair(numbers: Sequence[int]) -> list[int]:
    """As torch reads one number or two."""
    return [int(number) for number in (numbers if len(numbers) == 2 else [numbers[0]] * 2)]


def adaptive_average_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    factors = whole_factors(size, x.shape[-2:])
    if factors is None:
        return linear(x, *_bins(x.shape[-2:], size))
    return x.mean((-2, -1), keepdim=True) if tuple(size) == (1, 1) else aten.avg_pool2d(x, factors, factors)


def adaptive_average_pool_backward(gradient: Tensor, x: Tensor) -> Tensor:
    factors = whole_factors(gradient.shape[-2:], x.shape[-2:])
    if factors is None:
        return linear_backward(gradient, *_bins(x.shape[-2:], gradient.shape[-2:]))
    share = gradient / (factors[0] * factors[1])
    return share.expand(x.shape) if tuple(gradient.shape[-2:]) == (1, 1) else repeat(share, factors)


def _bins(sizes: Sequence[int], out: Sequence[int]) -> tuple[Along, Along]:
    rows, columns = (
        (aten._adaptive_avg_pool2d.default, int(size), ((int(bins), int(size)),))
        for size, bins in zip(sizes, out, strict=True)
    )
    return rows, columns
