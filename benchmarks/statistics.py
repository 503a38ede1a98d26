"""Intervals and tests for students that are compared on the same test images, paired by seed.

A seed is one draw of images, weights and batches; the test images are the same for all seeds and variants. What varies
over seeds decides what can be said of the method, so that intervals over test images alone would promise too much.
"""

import math
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Paired:
    """One variant minus another on the same test images, in points of accuracy."""

    seeds: int
    points: float
    t95: tuple[float, float]
    bootstrap95: tuple[float, float]
    only_first: int
    """Test images that the first alone has right, pooled over seeds."""
    only_second: int
    p: float
    """McNemar's exact test of the pooled counts; it takes the seeds' answers to one image for independent."""
    p_by_seed: tuple[float, ...]
    """The same for each seed alone, which says of two students, not of two methods."""


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """First minus second, both [seeds, images], true where the student is right; row s of both has the same seed."""
    differences = 100.0 * (first.astype(float) - second.astype(float))
    only_first, only_second = (first & ~second).sum(axis=1), (second & ~first).sum(axis=1)
    return Paired(
        seeds=len(first),
        points=float(differences.mean()),
        t95=t_interval(differences.mean(axis=1)),
        bootstrap95=bootstrap_interval(differences),
        only_first=int(only_first.sum()),
        only_second=int(only_second.sum()),
        p=mcnemar(int(only_first.sum()), int(only_second.sum())),
        p_by_seed=tuple(mcnemar(int(a), int(b)) for a, b in zip(only_first, only_second, strict=True)),
    )


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t over seeds; NaN from one seed or more than ten."""
    quantile = T_95.get(len(values) - 1, float("nan"))
    half = quantile * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap_interval(differences: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of [seeds, images], resampling seeds and, within them, test images."""
    generator = np.random.default_rng(0)
    seeds, images = differences.shape
    # Images with the same differences at all seeds are exchangeable, and there are few kinds of them.
    kinds, counts = np.unique(differences, axis=1, return_counts=True)
    means = np.empty(draws)
    for draw in range(draws):
        drawn = kinds @ generator.multinomial(images, counts / images) / images
        means[draw] = drawn[generator.integers(seeds, size=seeds)].mean()
    return percentiles(means)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % quantile; infinite values are as good as others."""
    low, high = np.quantile(values, [0.025, 0.975], method="closest_observation")
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test (McNemar 1947) from the counts of images that one alone has right.

    Under the hypothesis each of those is a fair coin: twice the smaller binomial tail, at most 1.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    # By logarithms, since 2**-count is nothing in float64 from about a thousand on.
    logarithms = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(logarithm) for logarithm in logarithms))
