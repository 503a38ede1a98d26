"""What budget curves say, on curves whose answer is known."""

import numpy as np
import pytest

from diffdfkd.benchmarks.ablation.budgets import Budget, Curve, at_equal_cost, crossing, fastest, worth

COST = np.array([300.0, 1000.0, 3000.0, 10000.0])


def logarithmic(images: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Ten points for each tenfold."""
    return 50 + 10 * np.log10(images) + shift


def curve(*shifts: float) -> Curve:
    return Curve(COST, np.stack([logarithmic(COST, shift) for shift in shifts]))


def test_a_curve_that_is_log_linear_gives_one_ratio_everywhere() -> None:
    # Ten points a tenfold: log10(4) tenfolds above it, each image is worth four.
    shift = 10 * np.log10(4)
    found = worth(curve(shift, shift), curve(0.0, 0.0))
    assert [each.bound for each in found] == ["", "", "at least", "at least"]
    assert [each.ratio for each in found[:2]] == pytest.approx([4, 4])
    assert [each.ratio for each in found[2:]] == pytest.approx([10 / 3, 1])
    assert [(each.low, each.high) for each in found[:2]] == [(pytest.approx(4), pytest.approx(4))] * 2
    assert found[3].low == found[3].high == np.inf


def test_the_other_way_round_it_is_the_inverse() -> None:
    shift = 10 * np.log10(4)
    found = worth(curve(0.0), curve(shift))
    assert [each.bound for each in found] == ["at most", "at most", "", ""]
    assert found[0].ratio == 1 and found[1].ratio == pytest.approx(0.3)
    assert [each.ratio for each in found[2:]] == pytest.approx([0.25, 0.25])
    assert np.isnan(found[0].low), "one seed has no interval"


def test_the_interval_is_that_of_the_seeds() -> None:
    # Own runs of three seeds are worth 2, 4 and 8; a draw of three seeds is worth their geometric mean.
    own = curve(*(10 * np.log10(factor) for factor in (2, 4, 8)))
    first = worth(own, curve(0.0, 0.0, 0.0), draws=4000)[0]
    assert first.ratio == pytest.approx(4)
    generator = np.random.default_rng(5)
    naive = 2.0 ** generator.choice([1, 2, 3], size=(20_000, 3)).mean(axis=1)
    assert (first.low, first.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), rel=1e-6)


def test_seeds_are_drawn_together() -> None:
    # Each seed is harder or easier for both: paired, the ratio is certain.
    found = worth(curve(0 + 3, 5 + 3, -5 + 3), curve(0.0, 5.0, -5.0))
    assert found[0].low == pytest.approx(found[0].high) == pytest.approx(10**0.3)


def test_crossing_takes_the_first_of_a_curve_that_falls_back() -> None:
    accuracy = np.array([60.0, 80.0, 70.0, 90.0])
    assert crossing(COST, accuracy, 80) == pytest.approx(1000)
    assert crossing(COST, accuracy, 85) == pytest.approx(3000 * (10 / 3) ** 0.75)
    assert crossing(COST, accuracy, 60) == 300
    assert crossing(COST, accuracy, 59) == 0
    assert crossing(COST, accuracy, 91) == np.inf


def test_at_equal_cost_interpolates_in_the_logarithm_and_stays_inside() -> None:
    own = Curve(np.array([100.0, 1000.0, 5477.2256, 20000.0]), np.array([[50.0, 81.0, 88.0, 90.0]]))
    found = at_equal_cost(own, curve(0.0))
    assert [each.cost for each in found] == [1000.0, 5477.2256]
    assert [each.points for each in found] == pytest.approx([1.0, 88 - logarithmic(np.array(5477.2256))])


def test_fastest_of_those_that_reach_it() -> None:
    budgets = [
        Budget("a", 300, 300, 70.0, 20.0),
        Budget("a", 1000, 300, 81.0, 60.0),
        Budget("a", 300, 1000, 82.0, 50.0),
        Budget("b", None, 300, 75.0, 5.0),
    ]
    found = fastest(budgets, 80.0)
    assert found == {"a": budgets[2], "b": None}
