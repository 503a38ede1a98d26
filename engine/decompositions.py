"""What a stage is traced with, so that its graph, gradients included, holds only what every engine has.

ATen's core decompositions leave operators behind, above all backward ones, that ONNX or TensorRT lack. Here each is put
into forward operators, from its textbook derivative. Gradients are those of activations: where a parameter's is asked
for, the operator stays. Height and width are numbers; the batch may be a symbol.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import core_aten_decompositions
from torch._decomp.decompositions import upsample_compute_output_size
from torch._ops import OpOverload

from diffdfkd.engine.attention import ATTENTION
from diffdfkd.engine.max_pooling import adaptive_max_pool, adaptive_max_pool_backward, max_pool_backward
from diffdfkd.engine.normalization import (
    batch_norm,
    batch_norm_backward,
    batch_norm_without_memory,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from diffdfkd.engine.separable import (
    adaptive_average_pool,
    adaptive_average_pool_backward,
    average_pool,
    average_pool_backward,
    padding,
    resizing,
)

aten = torch.ops.aten

RESIZING = (
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """The table make_fx traces with: core ATen's, and ours in the place of those that leave what engines lack."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    ours: dict[OpOverload, Callable[..., Any]] = {
        aten.convolution_backward.default: convolution_backward,
        aten.native_layer_norm.default: layer_norm,
        aten.native_layer_norm_backward.default: layer_norm_backward,
        aten.native_group_norm_backward.default: group_norm_backward,
        aten.native_batch_norm.default: batch_norm,
        # A symbolic trace has this one, before the table is asked.
        aten._native_batch_norm_legit.no_stats: batch_norm_without_memory,
        aten.native_batch_norm_backward.default: batch_norm_backward,
        aten.hardshrink_backward.default: shrink_backward,
        aten.softshrink_backward.default: shrink_backward,
        aten.max_pool2d_with_indices_backward.default: max_pool_backward,
        aten.adaptive_max_pool2d.default: adaptive_max_pool,
        aten.adaptive_max_pool2d_backward.default: adaptive_max_pool_backward,
        aten.avg_pool2d.default: average_pool,
        aten.avg_pool2d_backward.default: average_pool_backward,
        aten._adaptive_avg_pool2d.default: adaptive_average_pool,
        aten._adaptive_avg_pool2d_backward.default: adaptive_average_pool_backward,
        aten.reflection_pad2d_backward.default: padding(aten.reflection_pad2d.default),
        aten.replication_pad2d_backward.default: padding(aten.replication_pad2d.default),
        aten.as_strided.default: as_strided,
        aten.as_strided_.default: restride,
        aten.constant_pad_nd.default: constant_pad,
        aten.slice_backward.default: slice_backward,
        aten.select_backward.default: select_backward,
        **ATTENTION,
    }
    # Every engine has these, and gathers in their place would be slow.
    for kept in (aten.reflection_pad2d, aten.replication_pad2d):
        table.pop(kept.default, None)
    for name in RESIZING:
        operator = getattr(aten, name).default
        ours[operator], ours[getattr(aten, f"{name}_backward").default] = resizing(operator)
    return table | ours


@contextmanager
def whole_resizing() -> Iterator[None]:
    """For a symbolic trace, in which torch would spell resizing out in gathers before the table is asked."""
    packets = [getattr(aten, name) for name in RESIZING]
    before = {overload: overload.py_kernels.copy() for packet in packets for overload in (packet.default, packet.vec)}
    keys = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
    try:
        for packet in packets:
            for key in keys:
                packet.default.py_kernels.pop(key, None)
                packet.vec.py_kernels[key] = partial(_resize, packet.default)
            packet.default._dispatch_cache.clear()
            packet.vec._dispatch_cache.clear()
        yield
    finally:
        for overload, kernels in before.items():
            overload.py_kernels.clear()
            overload.py_kernels.update(kernels)
            overload._dispatch_cache.clear()


def _resize(operator: OpOverload, x: Tensor, size: Sequence[int] | None, *options: Any) -> Tensor:
    """`options`: align_corners, where the operator has it, and the scales."""
    *corners, scales = options
    size = upsample_compute_output_size(x.shape, size, scales)
    return operator(x, size, *corners, *(scales or ()))


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """Of x alone: the convolution of the other kind, with the same weight."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    kernel = weight.shape[2:]
    none = [0] * len(kernel)
    if transposed:
        made = aten.convolution(gradient, weight, None, stride, padding, dilation, False, none, groups)
        # Where output padding reaches a further place of the kernel, there is one more.
        for dimension, size in enumerate(x.shape[2:], 2):
            made = made if made.shape[dimension] == size else aten.slice(made, dimension, 0, size)
        return made, None, None
    margins = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if set(stride) == {1} and min(margins) >= 0:
        turned = _adjoint(weight, groups)
        made = aten.convolution(gradient, turned, None, stride, margins, dilation, False, none, groups)
        return made, None, None
    # How far beyond the windows' last places the input reaches.
    places = zip(x.shape[2:], gradient.shape[2:], stride, padding, margins, strict=True)
    rest = [int(size - ((out - 1) * s - p + margin + 1)) for size, out, s, p, margin in places]
    # TensorRT has no transposed convolution in bfloat16.
    wide = torch.float32 if gradient.dtype == torch.bfloat16 else gradient.dtype
    made = aten.convolution(gradient.to(wide), weight.to(wide), None, stride, padding, dilation, True, rest, groups)
    return made.to(gradient.dtype), None, None


def _adjoint(weight: Tensor, groups: int) -> Tensor:
    """[groups O, I, ...] -> [groups I, O, ...], turned around: a plain convolution is an engine's fastest."""
    outputs, inputs, *kernel = weight.shape
    if groups == 1:
        turned = weight.transpose(0, 1)
    else:
        turned = weight.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
        turned = turned.reshape(groups * inputs, outputs // groups, *kernel)
    return turned.flip([*range(2, weight.dim())]) if max(kernel) > 1 else turned


def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    """A tensor's own elements in their own order, which is all that pooling to one pixel wants of it."""
    if _as_it_is(x, size, stride, offset):
        return aten.alias(x)
    dense = [prod(size[place + 1 :]) for place in range(len(size))]
    if not offset and x.is_contiguous() and x.numel() == prod(size) and [*stride] == dense:
        return x.view(size)
    return NotImplemented


def restride(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    """The same in place."""
    return x if _as_it_is(x, size, stride, offset) else NotImplemented


def _as_it_is(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None) -> bool:
    """Whether strides like these change nothing: those of single places may be any."""
    if tuple(size) != tuple(x.shape) or offset not in (None, x.storage_offset()):
        return False
    return all(n == 1 or new == old for n, new, old in zip(size, stride, x.stride(), strict=True))


def shrink_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Of hard and of soft shrinkage."""
    return torch.where(x.abs() > threshold, gradient, 0)


def constant_pad(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """Negative padding, which is cropping, apart from the rest: engines differ in it."""
    if all(extent >= 0 for extent in pad):
        return NotImplemented if any(pad) else x.clone()
    for place, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        size = x.shape[-place]
        if before < 0 or after < 0:
            x = aten.slice(x, -place, max(0, -before), size - max(0, -after))
    return aten.constant_pad_nd(x, [max(0, extent) for extent in pad], value)


def slice_backward(gradient: Tensor, sizes: Sequence[int], dimension: int, start: int, end: int, step: int) -> Tensor:
    """Zeros around, and between at a step above 1, in the place of a scatter."""
    dimension %= len(sizes)
    size, count = sizes[dimension], gradient.shape[dimension]
    if count == size:
        return gradient
    inner = [0, 0] * (len(sizes) - 1 - dimension)
    if step > 1:
        spread = aten.constant_pad_nd(gradient.unsqueeze(dimension + 1), [*inner, 0, step - 1])
        gradient = spread.reshape(*sizes[:dimension], count * step, *sizes[dimension + 1 :])
    start = max(0, start + size) if start < 0 else start
    return aten.constant_pad_nd(gradient, [*inner, start, size - start - count * step])


def select_backward(gradient: Tensor, sizes: Sequence[int], dimension: int, index: int) -> Tensor:
    """Zeros before and after."""
    dimension %= len(sizes)
    index = index + sizes[dimension] if index < 0 else index
    return slice_backward(gradient.unsqueeze(dimension), sizes, dimension, index, index + 1, 1)
