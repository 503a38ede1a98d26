import math

import pytest
import torch

from diffdfkd.kernels.philox import (
    CUTMIX,
    INITIAL_NOISE,
    STEP_NOISE,
    philox4x32,
    philox_integers,
    philox_normal,
    philox_uniform,
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
