"""Memory formats of latents [B, c, h, w] in the kernels: elements are numbered as they lie in z's memory.

A kernel walks a sample's n = c h w elements in the order of z's memory, so that all tensors of z's format are read and
written in wide, contiguous pieces. A tensor of the other format is reached element by element, at its `place`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdfkd.kernels.launch import unreadable_strides


def is_channels_last(name: str, tensor: Tensor) -> bool:
    """Whether [B, c, h, w] is channels_last rather than contiguous; ValueError for any other strides."""
    if tensor.is_contiguous():
        return False
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return True
    raise unreadable_strides(name, tensor)


def is_crossed(name: str, tensor: Tensor, like: Tensor) -> bool:
    """Whether ``tensor`` lies in the format that ``like`` does not lie in."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if like.is_contiguous(memory_format=memory_format) and tensor.is_contiguous(memory_format=memory_format):
            return False
    is_channels_last(name, tensor)
    return True


@triton.jit
def place(i, channels, pixels, CHANNELS_LAST: tl.constexpr, CROSSED: tl.constexpr):
    """Index in a sample's memory of element i of z's memory; CROSSED: the tensor is of the other format."""
    if not CROSSED:
        return i
    elif CHANNELS_LAST:
        return (i % channels) * pixels + i // channels
    else:
        return (i % pixels) * channels + i // pixels


@triton.jit
def pixel_of(i, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Index y * w + x of the pixel of element i of z's memory."""
    if CHANNELS_LAST:
        return i // channels
    else:
        return i % pixels
