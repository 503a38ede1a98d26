"""What budget curves say to a user: the worth of an image, the seconds to an accuracy, and comparisons at equal cost.

A curve is a variant's accuracy over a cost (images, seconds or network evaluations), seed by seed, at one number of
distillation steps. Between two budgets it is straight in the logarithm of the cost; beyond them nothing is said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffdfkd.benchmarks.statistics import percentiles

DRAWS = 2000


@dataclass(frozen=True)
class Curve:
    cost: np.ndarray
    """[budgets], ascending."""
    accuracy: np.ndarray
    """[seeds, budgets], in per cent."""


@dataclass(frozen=True)
class Worth:
    """How much of the other's cost reaches the accuracy that ``cost`` of one's own reaches: ratio = other / cost."""

    cost: float
    accuracy: float
    ratio: float
    bound: Literal["", "at least", "at most"]
    """Where the other's curve ends below the accuracy, or begins above it, its last or first cost is a bound."""
    low: float
    high: float
    """95 % interval by bootstrap over seeds; infinite where some draws of seeds never get there, 0 where they begin
    above."""


def worth(own: Curve, other: Curve, draws: int = DRAWS) -> list[Worth]:
    """For each budget of one's own curve; the same seeds are drawn for both, whose rows belong together."""
    generator = np.random.default_rng(0)
    seeds = len(own.accuracy)
    chosen = generator.integers(seeds, size=(draws, seeds))
    found = []
    mean, other_mean = own.accuracy.mean(axis=0), other.accuracy.mean(axis=0)
    for place, cost in enumerate(own.cost):
        ratios = np.array(
            [
                crossing(other.cost, other.accuracy[drawn].mean(axis=0), own.accuracy[drawn, place].mean()) / cost
                for drawn in chosen
            ]
        )
        reached = crossing(other.cost, other_mean, mean[place])
        bound: Literal["", "at least", "at most"] = ""
        if math.isinf(reached):
            bound, reached = "at least", other.cost[-1]
        elif reached == 0:
            bound, reached = "at most", other.cost[0]
        low, high = percentiles(ratios) if seeds > 1 else (math.nan, math.nan)
        found.append(Worth(float(cost), float(mean[place]), float(reached / cost), bound, low, high))
    return found


def crossing(cost: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """The lowest cost at which a curve [budgets] reaches the target: 0 where it begins there, infinite where never."""
    if accuracy[0] > target:
        return 0.0
    if accuracy[0] == target:
        return float(cost[0])
    for place in range(1, len(cost)):
        if accuracy[place] >= target:
            share = (target - accuracy[place - 1]) / (accuracy[place] - accuracy[place - 1])
            return float(cost[place - 1] * (cost[place] / cost[place - 1]) ** share)
    return math.inf


@dataclass(frozen=True)
class Equal:
    """One's own accuracy minus the other's at the same cost, in points."""

    cost: float
    points: float
    low: float
    high: float
    """95 % interval by bootstrap over seeds."""


def at_equal_cost(own: Curve, other: Curve, draws: int = DRAWS) -> list[Equal]:
    """At each of one's own budgets that lies within the other's curve."""
    generator = np.random.default_rng(0)
    seeds = len(own.accuracy)
    chosen = generator.integers(seeds, size=(draws, seeds))
    found = []
    for place, cost in enumerate(own.cost):
        # Of equal costs one may be a rounding above the other.
        if not other.cost[0] * (1 - 1e-9) <= cost <= other.cost[-1] * (1 + 1e-9):
            continue
        there = np.array([np.interp(math.log(cost), np.log(other.cost), row) for row in other.accuracy])
        differences = own.accuracy[:, place] - there
        low, high = percentiles(differences[chosen].mean(axis=1)) if seeds > 1 else (math.nan, math.nan)
        found.append(Equal(float(cost), float(differences.mean()), low, high))
    return found


@dataclass(frozen=True)
class Budget:
    """What a variant reached at one budget, mean over seeds."""

    variant: str
    images: int | None
    steps: int
    accuracy: float
    """In per cent."""
    seconds: float
    """Of synthesis and distillation."""


def fastest(budgets: Sequence[Budget], accuracy: float) -> dict[str, Budget | None]:
    """Of each variant's budgets that were run and reach the accuracy the one of the fewest seconds; None where none."""
    found = {}
    for variant in dict.fromkeys(budget.variant for budget in budgets):
        there = [budget for budget in budgets if budget.variant == variant and budget.accuracy >= accuracy]
        found[variant] = min(there, key=lambda budget: budget.seconds, default=None)
    return found
