"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11), the same integers on every device.

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (block, step, sample & 0xffffffff, stream << 28 | sample >> 32)

One block gives four 32-bit integers; block b serves the elements 4b .. 4b + 3 of a sample in (c, h, w) order, whatever
its memory format. A number therefore depends on (seed, sample, step, stream, element) alone: never on the batch, the
device or what was drawn before. Sample ids are global over a run: round * 2**40 + index, below 2**60.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL_NOISE, STEP_NOISE, CUTMIX, LABELS = range(4)
"""Streams: numbers of different streams are independent."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, by 16-bit halves: int64 must not overflow."""
    low, high = constant * (word & 0xFFFF), constant * (word >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors with values below 2**32, from four counter words of one shape and a key."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], word0)
        high1, low1 = _multiply(_MULTIPLIERS[1], word2)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return word0, word1, word2, word3


def philox_integers(seed: int, sample_ids: Tensor, step: int, stream: int, n: int) -> Tensor:
    """Integers int64 [B, n] in [0, 2**32) for the samples with the ids int64 [B]."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}; it must lie in [0, 2**64)")
    if not 0 <= stream < 16 or not 0 <= step <= _MASK:
        raise ValueError(f"stream and step: got {stream} and {step}; they must lie in [0, 16) and [0, 2**32)")
    if sample_ids.dim() != 1 or sample_ids.dtype != torch.int64:
        raise ValueError(f"sample_ids: got {sample_ids.dtype} {tuple(sample_ids.shape)}; int64 [B] expected")
    samples = sample_ids[:, None]  # [B, 1]
    block = torch.arange((n + 3) // 4, device=sample_ids.device)[None]  # [1, blocks]
    counter = torch.broadcast_tensors(
        block,
        torch.full_like(block, step),
        samples & _MASK,
        stream << 28 | samples >> 32,
    )
    words = philox4x32(counter, (seed & _MASK, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :n]  # [B, blocks, 4] -> [B, n]


def philox_uniform(seed: int, sample_ids: Tensor, step: int, stream: int, n: int) -> Tensor:
    """Uniform numbers float64 [B, n] in [0, 1) with 32 random bits."""
    return philox_integers(seed, sample_ids, step, stream, n).double() * 2.0**-32


def philox_normal(seed: int, sample_ids: Tensor, step: int, stream: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal numbers float32 [B, c, h, w], by Box-Muller on pairs of a block.

    The transform is computed in float64 and rounded, so that devices differ in the last bit at most.
    """
    n = math.prod(shape)
    integers = philox_integers(seed, sample_ids, step, stream, (n + 3) // 4 * 4)
    # The half keeps the logarithm finite.
    uniform = (integers.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, 0::2]))
    angle = 2.0 * math.pi * uniform[:, 1::2]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)
    return normal[:, :n].float().reshape(-1, *shape)
