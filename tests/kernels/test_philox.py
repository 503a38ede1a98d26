import math

import pytest
import torch
import triton
import triton.language as tl
from kernels_tolerances import NORMAL_TOLERANCE

from diffdfkd.kernels.philox import (
    CUTMIX,
    INITIAL_NOISE,
    STEP_NOISE,
    normal_at,
    normal_pair,
    normal_run,
    philox4x32,
    philox_integers,
    philox_normal,
    philox_uniform,
    philox_words,
    signed_words,
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    """kat_vectors of the Random123 library, philox4x32 with 10 rounds."""
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word):08x}" for word in philox4x32(words, (low, high))) == expected


def test_counter_layout() -> None:
    """Element 6 of sample 2**40 * 5 + 7 lies in block 1, lane 2; high words of seed and sample count."""
    seed, sample, step = 2**33 + 1, 2**40 * 5 + 7, 11
    counter = [torch.tensor(word) for word in (1, step, 7, CUTMIX << 28 | 5 << 8)]
    expected = philox4x32(counter, (1, 2))[2]
    assert philox_integers(seed, torch.tensor([sample]), step, CUTMIX, 8)[0, 6] == expected


def test_a_sample_does_not_depend_on_its_batch() -> None:
    ids = torch.tensor([3, 2**40, 17])
    together = philox_normal(5, ids, 2, STEP_NOISE, (3, 5, 7))
    for place, sample in enumerate(ids):
        assert torch.equal(philox_normal(5, sample[None], 2, STEP_NOISE, (3, 5, 7))[0], together[place])
    assert together.dtype == torch.float32 and together.shape == (3, 3, 5, 7)


def test_every_argument_changes_the_numbers() -> None:
    ids = torch.tensor([1])
    base = philox_integers(1, ids, 1, INITIAL_NOISE, 64)
    others = [
        philox_integers(2, ids, 1, INITIAL_NOISE, 64),
        philox_integers(1 + 2**32, ids, 1, INITIAL_NOISE, 64),
        philox_integers(1, ids + 1, 1, INITIAL_NOISE, 64),
        philox_integers(1, ids + 2**40, 1, INITIAL_NOISE, 64),
        philox_integers(1, ids, 2, INITIAL_NOISE, 64),
        philox_integers(1, ids, 1, STEP_NOISE, 64),
    ]
    assert all((base != other).sum() > 60 for other in others)


def test_normal_numbers_are_normal_and_independent() -> None:
    numbers = philox_normal(0, torch.arange(2000), 0, INITIAL_NOISE, (4, 4, 4)).double().flatten(1)
    n = numbers.numel()
    assert abs(numbers.mean()) < 4 / math.sqrt(n)
    assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((numbers**4).mean() - 3) < 4 * math.sqrt(96 / n)
    correlation = torch.corrcoef(numbers.T) - torch.eye(64)
    assert correlation.abs().max() < 5.5 / math.sqrt(2000)


def test_uniform_numbers() -> None:
    numbers = philox_uniform(0, torch.arange(1000), 0, CUTMIX, 7)
    assert numbers.shape == (1000, 7) and numbers.dtype == torch.float64
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 / math.sqrt(12 * 7000)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="seed"):
        philox_integers(-1, torch.tensor([1]), 0, 0, 4)
    with pytest.raises(ValueError, match="stream"):
        philox_integers(1, torch.tensor([1]), 0, 16, 4)
    with pytest.raises(ValueError, match="sample_ids"):
        philox_integers(1, torch.tensor([1.0]), 0, 0, 4)


@triton.jit
def _kernel(words, normals, singly, ids, step, low, high, N: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    identity, now = tl.load(ids + sample), tl.load(step)
    element = tl.arange(0, N)
    tl.store(normals + sample * N + element, normal_run(0, now, identity, low, high, 1, N))
    tl.store(singly + sample * N + element, normal_at(element, now, identity, low, high, 1))
    block = tl.arange(0, N // 4)
    word0, word1, word2, word3 = philox_words(block, now, identity, low, high, 1)
    tl.store(words + sample * N + block * 4, word0.to(tl.int64))
    tl.store(words + sample * N + block * 4 + 1, word1.to(tl.int64))
    tl.store(words + sample * N + block * 4 + 2, word2.to(tl.int64))
    tl.store(words + sample * N + block * 4 + 3, word3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 2**33 + 1, 2**63 - 1, 2**64 - 1])
def test_kernels_draw_the_same_integers_and_normals(seed: int) -> None:
    n, ids, step = 4096, torch.tensor([0, 5, 2**40 * 3 + 7, 2**59 + 2**33 + 1]), torch.tensor([11], dtype=torch.int32)
    words = torch.zeros(4, n, dtype=torch.int64)
    normals, singly = torch.full((2, 4, n), torch.nan).unbind()
    _kernel[(4,)](words, normals, singly, ids, step, *signed_words(seed), n)
    assert torch.equal(words, philox_integers(seed, ids, 11, STEP_NOISE, n))
    torch.testing.assert_close(
        normals, philox_normal(seed, ids, 11, STEP_NOISE, (1, 1, n))[:, 0, 0], **NORMAL_TOLERANCE
    )
    assert torch.equal(singly, normals)


@triton.jit
def _pair_kernel(first, second, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = normal_pair(tl.load(first + i).to(tl.uint32), tl.load(second + i).to(tl.uint32))
    tl.store(out + i, x)
    tl.store(out + N + i, y)


def test_normals_at_the_ends_of_the_range() -> None:
    """The largest and smallest radius, the change from series to logarithm, every quarter of a turn and its edges."""
    ends = [0, 1, 2**32 - 1, 2**32 - 2, 2**31, 2**32 - 2**26, 2**32 - 2**26 - 1, 2**32 - 2**26 + 1]
    turns = [quarter * 2**30 + offset for quarter in range(4) for offset in (0, 1, 2**29 - 1, 2**29, 2**29 + 1)]
    pairs = torch.cartesian_prod(torch.tensor(ends), torch.tensor([*turns, 2**32 - 1]))
    first, second = torch.nn.functional.pad(pairs, (0, 0, 0, 256 - len(pairs))).T.contiguous()
    out = torch.full((2, 256), torch.nan)
    _pair_kernel[(1,)](first, second, out, 256)
    radius = torch.sqrt(-2 * torch.log((first.double() + 0.5) * 2.0**-32))
    angle = 2 * math.pi * (second.double() + 0.5) * 2.0**-32
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()])
    torch.testing.assert_close(out.double(), expected, **NORMAL_TOLERANCE)


def test_a_step_on_the_device_draws_what_a_number_draws() -> None:
    step = torch.tensor([9], dtype=torch.int32)
    ids = torch.tensor([3, 4])
    assert torch.equal(philox_normal(1, ids, step, CUTMIX, (2, 3, 3)), philox_normal(1, ids, 9, CUTMIX, (2, 3, 3)))
