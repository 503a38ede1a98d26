"""Intervals and tests of paired students, against values by hand and the naive bootstrap."""

import numpy as np
import pytest

from diffdfkd.benchmarks.statistics import bootstrap_interval, mcnemar, paired, percentiles, t_interval


def test_t_interval_by_hand() -> None:
    # mean 3, sample deviation 1, three seeds: 3 -+ 4.303 / sqrt(3)
    low, high = t_interval(np.array([2.0, 3.0, 4.0]))
    assert (low, high) == pytest.approx((3 - 2.4843, 3 + 2.4843), abs=1e-3)
    assert np.isnan(t_interval(np.array([2.0]))[0])


def test_bootstrap_interval_holds_the_mean_and_shrinks_with_images() -> None:
    generator = np.random.default_rng(0)
    few, many = (generator.normal(3, 10, (3, images)) for images in (50, 5000))
    (low, high), (low_many, high_many) = bootstrap_interval(few, 500), bootstrap_interval(many, 500)
    assert low < few.mean() < high and low_many < many.mean() < high_many
    assert high_many - low_many < (high - low) / 3


def test_bootstrap_is_that_of_drawn_seeds_and_images() -> None:
    generator = np.random.default_rng(1)
    differences = generator.choice([-100.0, 0.0, 100.0], p=[0.05, 0.85, 0.1], size=(3, 400))
    differences += np.array([[0.0], [2.0], [5.0]])
    means = np.array(
        [differences[generator.integers(3, size=3)][:, generator.integers(400, size=400)].mean() for _ in range(20_000)]
    )
    assert bootstrap_interval(differences, 20_000) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.3)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        # 2 * (1 + 10 + 45) / 2**10; 2 * 1 / 2**5; a draw; none at all.
        (8, 2, 112 / 1024),
        (0, 5, 2 / 32),
        (6, 6, 1.0),
        (0, 0, 1.0),
        # Agresti, Categorical Data Analysis (2002), table 10.1: approval of 86 and 150 who changed their minds.
        (86, 150, 3.716e-5),
    ],
)
def test_mcnemar_against_known_values(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-3)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_of_many_images_neither_overflows_nor_vanishes() -> None:
    assert mcnemar(5000, 5000) == 1.0
    # The normal approximation with a correction: z = (|5100 - 4900| - 1) / sqrt(10000) = 1.99.
    assert mcnemar(5100, 4900) == pytest.approx(0.0466, abs=2e-4)
    assert 0 < mcnemar(900, 300) < 1e-60


def test_paired_counts_and_means_by_hand() -> None:
    first = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    second = np.array([[1, 0, 0, 0], [0, 1, 1, 0]], dtype=bool)
    found = paired(first, second)
    assert (found.seeds, found.points, found.only_first, found.only_second) == (2, 25.0, 3, 1)
    assert found.p_by_seed == (0.5, 1.0) and found.p == pytest.approx(2 * 5 / 16)
    assert found.t95 == pytest.approx((25 - 12.706 * 25, 25 + 12.706 * 25))


def test_percentiles_take_infinite_values() -> None:
    assert percentiles(np.array([1.0] * 50 + [np.inf] * 50)) == (1.0, np.inf)
