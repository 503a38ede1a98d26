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
import triton
import triton.language as tl
from torch import Tensor

INITIAL_NOISE, STEP_NOISE, CUTMIX, LABELS, EXAMPLES, PROMPTS, FORK, REPAIR = range(8)
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


def check_seed(name: str, seed: int) -> None:
    """Raises ValueError for what is no seed of 64 bits."""
    if not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"{name}: got {seed!r}; it must lie in [0, 2**64)")


def philox_integers(seed: int, sample_ids: Tensor, step: int | Tensor, stream: int, n: int) -> Tensor:
    """Integers int64 [B, n] in [0, 2**32) for the samples with the ids int64 [B].

    A ``step`` that lives on the device, an integer tensor with one element, is not checked.
    """
    check_seed("seed", seed)
    if not 0 <= stream < 16 or (isinstance(step, int) and not 0 <= step <= _MASK):
        raise ValueError(f"stream and step: got {stream} and {step}; they must lie in [0, 16) and [0, 2**32)")
    if sample_ids.dim() != 1 or sample_ids.dtype != torch.int64:
        raise ValueError(f"sample_ids: got {sample_ids.dtype} {tuple(sample_ids.shape)}; int64 [B] expected")
    samples = sample_ids[:, None]  # [B, 1]
    block = torch.arange((n + 3) // 4, device=sample_ids.device)[None]  # [1, blocks]
    counter = torch.broadcast_tensors(
        block,
        step.to(block.dtype).view(1, 1) if isinstance(step, Tensor) else torch.full_like(block, step),
        samples & _MASK,
        stream << 28 | samples >> 32,
    )
    words = philox4x32(counter, (seed & _MASK, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :n]  # [B, blocks, 4] -> [B, n]


def philox_uniform(seed: int, sample_ids: Tensor, step: int, stream: int, n: int) -> Tensor:
    """Uniform numbers float64 [B, n] in [0, 1) with 32 random bits."""
    return philox_integers(seed, sample_ids, step, stream, n).double() * 2.0**-32


def philox_normal(seed: int, sample_ids: Tensor, step: int | Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
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


def signed_words(seed: int) -> tuple[int, int]:
    """Low and high 32 bits of a seed as int32, so that every seed is served by one compiled kernel."""
    low, high = seed & _MASK, seed >> 32
    return (low ^ 1 << 31) - (1 << 31), (high ^ 1 << 31) - (1 << 31)


@triton.jit
def philox_words(block, step, sample, seed_low, seed_high, STREAM: tl.constexpr):
    """The four words uint32 of the blocks, as `philox_integers` numbers them: step int32, sample int64."""
    block = block.to(tl.uint32)
    zero = block * 0
    return tl.philox_impl(
        block,
        zero + step.to(tl.uint32),
        zero + (sample & 0xFFFFFFFF).to(tl.uint32),
        zero + ((sample >> 32).to(tl.uint32) | (STREAM << 28)),
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )


@triton.jit
def normal_pair(first, second):
    """Box-Muller in float32: two independent normals from two words uint32."""
    u = (first.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    # The float32 nearest to a u near 1 has lost 1 - u, which the complement still holds: -log(1 - v) by its series.
    v = ((first ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    radius = tl.sqrt(2.0 * tl.where(v < 0.015625, series, -tl.log(u)))
    # The nearest quarter of a turn is exact in the word, which leaves an angle of at most pi / 4 for Taylor's series;
    # the library's sine reduces angles of any size, for which it takes local memory.
    quarter = (second + 0x20000000) >> 30
    rest = (second - (quarter << 30)).to(tl.int32, bitcast=True)
    angle = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09  # 2 pi 2^-32
    square = angle * angle
    by_sine = 8.333333333333333e-3 + square * (-1.984126984126984e-4 + square * 2.7557319223985893e-6)
    sine = angle * (1.0 + square * (-0.16666666666666666 + square * by_sine))
    by_cosine = 0.041666666666666664 + square * (-1.388888888888889e-3 + square * 2.48015873015873e-5)
    cosine = 1.0 + square * (-0.5 + square * by_cosine)
    swapped = quarter % 2 == 1
    x, y = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def normal_run(first_block, step, sample, seed_low, seed_high, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Normals [BLOCK] of consecutive elements from 4 * first_block on: four elements a Philox block."""
    block = first_block + tl.arange(0, BLOCK // 4)
    word0, word1, word2, word3 = philox_words(block, step, sample, seed_low, seed_high, STREAM)
    normal0, normal1 = normal_pair(word0, word1)
    normal2, normal3 = normal_pair(word2, word3)
    # [BLOCK // 4, 2 (pair), 2 (of the pair)]
    return tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3)).reshape(BLOCK)


@triton.jit
def normal_at(element, step, sample, seed_low, seed_high, STREAM: tl.constexpr):
    """Normals of any elements, each from a Philox block of its own."""
    word0, word1, word2, word3 = philox_words(element // 4, step, sample, seed_low, seed_high, STREAM)
    late = element % 4 >= 2
    normal0, normal1 = normal_pair(tl.where(late, word2, word0), tl.where(late, word3, word1))
    return tl.where(element % 2 == 0, normal0, normal1)
