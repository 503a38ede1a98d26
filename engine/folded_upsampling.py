"""Doubling an image and convolving it, as one convolution of the small image: 16 products a pixel in the place of 36.

Each pixel of a doubled image stands there four times, so the nine taps of a 3 x 3 window meet four different pixels,
and the weights that meet one pixel add up: a transposed convolution of stride 2 whose kernel, 4 x 4, is the 3 x 3 one
convolved with four ones. The same sums in another order, so equal but for rounding; the gradient is cheaper alike.
UNets and decoders of diffusion models double so at every resolution.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffdfkd.engine.separable import outside_trace

Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(image [B, C, H, W], kernel [C, O, 4, 4] of `fold`, bias [O] or None) -> [B, O, 2H, 2W]."""


class FoldedUpsampling(TorchFunctionMode):
    """While a stage is traced: nearest interpolation to twice the size and the 3 x 3 convolution of it are one.

    The doubled image is made as before, and left for dead code where nothing else reads it. Convolutions whose weights
    are inputs of the stage stay as they are, and so does an image that is written to in between.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self._doubled: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        """By id the doubled image, held so that its id stays its own, what was doubled, and the versions of both."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = None
        if function is torch.conv2d:
            made = self._convolved(*args, **(kwargs or {}))
        if made is None:
            made = function(*args, **(kwargs or {}))
        if function is functional.interpolate:
            # It hands its arguments on by name.
            self._note(made, *args, **(kwargs or {}))
        return made

    def _note(
        self,
        made: Tensor,
        input: Tensor,
        *,
        mode: str,
        scale_factor: Any = None,
        recompute_scale_factor: bool | None = None,
        **others: Any,
    ) -> None:
        if input.dim() != 4 or not mode.startswith("nearest") or made.is_inference() or input.is_inference():
            return  # of inference tensors nobody counts who writes to them
        # A factor of 2.1 gives as many pixels of 8, but others; "nearest-exact" gives the same at whole factors.
        whole = scale_factor is None or recompute_scale_factor or scale_factor in (2, (2, 2), [2, 2])
        height, width = input.shape[-2:]
        # Doubled without a gradient it hands none on.
        if whole and made.shape[-2:] == (2 * height, 2 * width) and made.requires_grad == input.requires_grad:
            self._doubled[id(made)] = made, input, [made._version, input._version]

    def _convolved(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """None for a convolution that is none of these."""
        known = self._doubled.get(id(input))
        if known is None or groups != 1 or not (_settled(weight) and _settled(bias)):
            return None
        if tuple(weight.shape[2:]) != (3, 3) or any(_pair(given) != (1, 1) for given in (stride, padding, dilation)):
            return None
        made, image, versions = known
        if [made._version, image._version] != versions:
            return None
        with outside_trace():
            kernel = fold(weight)
        return self.form(image, kernel, bias)


def fold(weight: Tensor) -> Tensor:
    """Kernel [C, O, 4, 4] of the transposed convolution of stride 2, padding 1, from the 3 x 3 one [O, C, 3, 3]."""
    flipped = weight.detach().double().flip(2, 3).transpose(0, 1)
    kernel = sum(functional.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1))
    assert isinstance(kernel, Tensor)
    return kernel.to(weight.dtype).contiguous()


def transposed(image: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """As the one operator that it is."""
    return functional.conv_transpose2d(image, kernel, bias, stride=2, padding=1)


def by_phases(image: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """As a convolution of 2 x 2 to the four pixels that lie around each corner of the small image's pixels.

    For engines that lack the transposed one: TensorRT has none in bfloat16. Shuffled, they are one pixel too many on
    each side.
    """
    with outside_trace():
        inputs, outputs = kernel.shape[:2]
        # Row 2 - 2r + p of the kernel: what the r-th of two pixels gives to the p-th place around their corner.
        taps = kernel.reshape(inputs, outputs, 2, 2, 2, 2).flip(2, 4)
        phases = taps.permute(1, 3, 5, 0, 2, 4).reshape(4 * outputs, inputs, 2, 2).contiguous()
        repeated = None if bias is None else bias.repeat_interleave(4)
    around = functional.conv2d(image, phases, repeated, padding=1)
    return functional.pixel_shuffle(around, 2)[..., 1:-1, 1:-1]


def _settled(value: Tensor | None) -> bool:
    """Whether a weight is a constant of the stage."""
    return value is None or not (is_fake(value) or value.requires_grad)


def _pair(given: Any) -> tuple[int, ...]:
    return (given, given) if isinstance(given, int) else tuple(given)
