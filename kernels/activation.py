"""Activations [B, C, ...] in the kernels of BatchNorm moments: which program takes which part, and what is refused.

A tile is [positions, channels] of one sample, long where memory is contiguous, so that both memory formats are read and
written in wide pieces. Programs are numbered over samples, runs of tiles and blocks of channels, the last fastest.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdfkd.kernels.launch import (
    Kernel,
    blocks,
    check_floats,
    check_tensor,
    power_of_two,
    settle_kernel,
    unreadable_strides,
)

TILE = 4096
"""Elements that a program holds at once."""

PROGRAMS = 512
"""Of one launch, about: enough for all multiprocessors. Beyond, a program takes a run of several tiles."""

MOST_CHUNKS = 16
"""Tiles of a run."""


class Tiling(NamedTuple):
    """How programs share an activation [B, C, ...] of P positions; from its shape and strides alone."""

    channels: int
    positions: int
    channels_last: bool
    """Whether neighbours in memory are channels of a position, not positions of a channel."""
    block_p: int
    block_c: int
    chunks: int
    """Tiles [block_p, block_c] of a run of positions."""

    @property
    def splits(self) -> int:
        """Runs of a sample."""
        return blocks(self.positions, self.chunks * self.block_p)

    @property
    def channel_blocks(self) -> int:
        return blocks(self.channels, self.block_c)

    @property
    def warps(self) -> int:
        return max(1, self.block_p * self.block_c // 512)

    @property
    def constants(self) -> dict[str, Any]:
        inner = self.channels if self.channels_last else self.positions
        return {
            "BLOCK_P": self.block_p,
            "BLOCK_C": self.block_c,
            "CHANNELS_LAST": self.channels_last,
            # Triton asks of a size only whether 16 divides it; wide loads need less.
            "ALIGNED": math.gcd(inner, 16),
        }


def activation_tiling(activation: Tensor, name: str = "activation") -> Tiling:
    """ValueError for strides that are neither contiguous nor channels_last."""
    batch, channels = activation.shape[:2]
    positions = activation.numel() // (batch * channels)
    channels_last = activation.movedim(1, -1).is_contiguous()
    if not channels_last and not activation.is_contiguous():
        raise unreadable_strides(name, activation)
    p, c = power_of_two(positions), power_of_two(channels)
    if channels_last and channels > 1:
        # 64 channels of float16 are a cache line.
        block_c = min(c, max(64, TILE // p))
        block_p = min(p, TILE // block_c)
    else:
        channels_last = False
        block_p = min(p, max(512, TILE // c))
        block_c = min(c, TILE // block_p)
    tiles = batch * blocks(channels, block_c) * blocks(positions, block_p)
    chunks = min(max(1, tiles // PROGRAMS), MOST_CHUNKS, blocks(positions, block_p))
    return Tiling(channels, positions, channels_last, block_p, block_c, chunks)


@triton.jit
def program_place(channels, splits, RUN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row (a run of a sample), sample, first position and first channel of this program, int64."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row = tl.program_id(0) // channel_blocks
    first_c = tl.program_id(0) % channel_blocks * BLOCK_C
    return row.to(tl.int64), (row // splits).to(tl.int64), (row % splits * RUN).to(tl.int64), first_c.to(tl.int64)


@triton.jit
def aligned_sizes(channels, positions, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr):
    """Both as they are, but the compiler sees that ALIGNED divides the one that lies contiguous in memory."""
    if CHANNELS_LAST:
        return channels // ALIGNED * ALIGNED, positions
    else:
        return channels, positions // ALIGNED * ALIGNED


@triton.jit
def tile_offsets(
    first_p,
    first_c,
    channels,
    positions,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """[BLOCK_P, BLOCK_C] int64, of a tile's elements in their sample."""
    p, c = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)[None, :]
    if CHANNELS_LAST:
        return (first_p * channels + first_c) + (p * channels + c)
    else:
        return (first_c * positions + first_p) + (c * positions + p)


def counted_samples(weight: Tensor) -> Tensor:
    """bool [B], as the kernels take it."""
    return weight > 0  # a copy, which stays as it is until the backward pass


def named_layers(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    if not inputs:
        raise ValueError("inputs: none; the input [B, C, ...] of at least one BatchNorm layer expected")
    return {f"inputs[{index}]": activation for index, activation in enumerate(inputs)}


def settle_inputs(inputs: dict[str, Tensor], weight: Tensor, kernel: Kernel) -> Literal["triton", "reference"]:
    """The form that is meant for these inputs; ValueError where they do not fit the weight, or that form."""
    form = settle_kernel(kernel, weight.device)
    for name, activation in inputs.items():
        shape = tuple(activation.shape)
        if activation.dim() < 2 or activation.numel() == 0 or not activation.is_floating_point():
            raise ValueError(f"{name}: got {activation.dtype} {shape}; floats [B, C, ...] expected, and not empty")
        if weight.shape != shape[:1]:
            raise ValueError(f"weight: got shape {tuple(weight.shape)} for {name} {shape}; {shape[:1]} expected")
        if activation.device != weight.device:
            raise ValueError(f"{name}: on {activation.device}, the weight on {weight.device}; move it there")
        if form == "triton":
            check_floats(**{name: activation})
            activation_tiling(activation, name)
    return form


def check_vectors(inputs: Sequence[Tensor], device: torch.device, **vectors: Sequence[Tensor]) -> None:
    """Raises ValueError unless each of ``vectors`` holds one [C] for each of the inputs [B, C, ...], on the device."""
    for name, layers in vectors.items():
        if len(layers) != len(inputs):
            raise ValueError(f"{name}: of {len(layers)} layers, the inputs of {len(inputs)}; as many expected")
        for index, (vector, activation) in enumerate(zip(layers, inputs, strict=True)):
            check_tensor(f"{name}[{index}]", vector, (activation.shape[1],), None, device)
