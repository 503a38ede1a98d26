"""Budget curves and what they say, for the page and as a table."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from diffdfkd.benchmarks.ablation.axis import Axis
from diffdfkd.benchmarks.ablation.budgets import Budget, Curve, Worth, at_equal_cost, fastest, worth
from diffdfkd.benchmarks.ablation.tables import Cell
from diffdfkd.engine.interval_chart import Mean, interval_curves
from diffdfkd.engine.page import table
from diffdfkd.engine.quantities import duration

COSTS: dict[str, Callable[[Cell], float]] = {
    "images": lambda cell: float(cell.images or 0),
    "seconds": lambda cell: float(cell.seconds.mean()),
    "network evaluations": lambda cell: float(cell.evaluations.mean()),
}


def budget_section(axis: Axis, cells: Sequence[Cell], mean_of: Callable[[np.ndarray], Mean]) -> str:
    """HTML of one axis whose variants were run at several budgets."""
    return "".join([_charts(cells, mean_of), _worth(axis, cells), _equal(axis, cells), _fastest(cells)])


def curve(cells: Sequence[Cell], variant: str, steps: int, cost: str) -> Curve | None:
    """A variant's curve over a cost at one number of steps; None with fewer than two budgets, or where it is free."""
    own = [cell for cell in cells if cell.variant == variant and cell.steps == steps and cell.images is not None]
    own.sort(key=COSTS[cost])
    costs = np.array([COSTS[cost](cell) for cell in own])
    if len(own) < 2 or costs[0] <= 0:
        return None
    return Curve(costs, np.stack([cell.accuracy for cell in own], axis=1))


def worth_rows(axis: Axis, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What one of a variant's images is worth in each other variant's, at equal accuracy and equal steps."""
    rows = []
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    for steps in sorted({cell.steps for cell in cells}):
        for variant in variants:
            own = curve(cells, variant, steps, "images")
            for other in variants:
                against = curve(cells, other, steps, "images")
                if variant == other or own is None or against is None:
                    continue
                rows += [
                    {"axis": axis.name, "variant": variant, "other": other, "steps": steps, **_columns(found)}
                    for found in worth(own, against)
                ]
    return rows


def _columns(found: Worth) -> dict[str, Any]:
    return {
        "images": int(found.cost),
        "accuracy": round(found.accuracy, 2),
        "bound": found.bound,
        "worth": round(found.ratio, 2),
        "bootstrap95_low": round(found.low, 2),
        "bootstrap95_high": round(found.high, 2),
    }


def _charts(cells: Sequence[Cell], mean_of: Callable[[np.ndarray], Mean]) -> str:
    """Accuracy over images at each number of steps, over steps at each number of images, and over seconds."""
    charts = []
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    all_steps = sorted({cell.steps for cell in cells})
    all_images = sorted({cell.images for cell in cells if cell.images is not None})
    for steps in all_steps:
        here = [cell for cell in cells if cell.steps == steps]
        levels = {cell.variant: mean_of(cell.accuracy) for cell in here if cell.images is None}
        for cost in ("images", "seconds"):
            series = {
                variant: [
                    (COSTS[cost](cell), mean_of(cell.accuracy))
                    for cell in here
                    if cell.variant == variant and cell.images is not None
                ]
                for variant in variants
            }
            series = {name: points for name, points in series.items() if len(points) > 1}
            title = f"Accuracy over {cost}, {steps:,} distillation steps"
            charts.append(interval_curves(title, series, levels if cost == "images" else {}, cost))
    if len(all_steps) > 1:
        for images in all_images:
            series = {
                variant: [
                    (float(cell.steps), mean_of(cell.accuracy))
                    for cell in cells
                    if cell.variant == variant and cell.images in (images, None)
                ]
                for variant in variants
            }
            series = {name: points for name, points in series.items() if len(points) > 1}
            charts.append(interval_curves(f"Accuracy over distillation steps, {images:,} images", series, {}, "steps"))
    return f'<div class="charts">{"".join(charts)}</div>'


def _worth(axis: Axis, cells: Sequence[Cell]) -> str:
    rows = [row for row in worth_rows(axis, cells) if axis.reference in (row["variant"], row["other"])]
    if not rows:
        return ""
    printed = [
        [
            f"{row['variant']} in {row['other']}",
            f"{row['steps']:,}",
            f"{row['images']:,}",
            f"{row['accuracy']:.2f}",
            f"{row['bound']} {row['worth']:.2f}".strip(),
            f"{_ratio(row['bootstrap95_low'])} to {_ratio(row['bootstrap95_high'])}",
        ]
        for row in rows
    ]
    head = ["one image of ... is worth", "steps", "images", "accuracy", "images of the other", "95 % over seeds"]
    return (
        f"<h3>What an image is worth at equal accuracy</h3>{table(head, printed)}"
        '<p class="note">Between two budgets a curve is straight in the logarithm of the images. At least: the other '
        "curve ends below the accuracy; at most: it begins above.</p>"
    )


def _ratio(value: float) -> str:
    return "?" if np.isnan(value) else "beyond" if np.isinf(value) else "below" if value == 0 else f"{value:.2f}"


def equal_rows(axis: Axis, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each variant minus the reference at equal seconds, and at equal network evaluations, at equal steps."""
    rows = []
    for cost in ("seconds", "network evaluations"):
        for steps in sorted({cell.steps for cell in cells}):
            reference = curve(cells, axis.reference, steps, cost)
            for variant in dict.fromkeys(cell.variant for cell in cells):
                own = curve(cells, variant, steps, cost)
                if variant == axis.reference or own is None or reference is None:
                    continue
                rows += [
                    {"axis": axis.name, "variant": variant, "equal": cost, "steps": steps, "cost": round(found.cost, 1)}
                    | {"points": round(found.points, 2)}
                    | {"bootstrap95_low": round(found.low, 2), "bootstrap95_high": round(found.high, 2)}
                    for found in at_equal_cost(own, reference)
                ]
    return rows


def _equal(axis: Axis, cells: Sequence[Cell]) -> str:
    rows = equal_rows(axis, cells)
    if not rows:
        return ""
    printed = [
        [
            row["variant"],
            f"{row['equal']}: {row['cost']:,.0f}",
            f"{row['steps']:,}",
            f"{row['points']:+.2f}",
            f"{row['bootstrap95_low']:+.2f} to {row['bootstrap95_high']:+.2f}",
        ]
        for row in rows
    ]
    return (
        f"<h3>Against {escape(axis.reference)} at equal cost</h3>"
        f"{table(['variant', 'cost', 'steps', 'points', '95 % over seeds'], printed)}"
    )


def targets(budgets: Sequence[Budget]) -> list[float]:
    """Whole per cents that some budgets reach and others do not, at most six of them, evenly over the range."""
    low, high = (pick(budget.accuracy for budget in budgets) for pick in (min, max))
    whole = [float(percent) for percent in range(int(np.ceil(low)), int(np.floor(high)) + 1)]
    return whole[:: -(-len(whole) // 6)] if whole else []


def _fastest(cells: Sequence[Cell]) -> str:
    budgets = [
        Budget(cell.variant, cell.images, cell.steps, float(cell.accuracy.mean()), float(cell.seconds.mean()))
        for cell in cells
    ]
    goals = targets(budgets)
    if not goals:
        return ""
    found = [fastest(budgets, goal) for goal in goals]
    rows = [
        [variant, *(_budget(reached[variant]) for reached in found)]
        for variant in dict.fromkeys(b.variant for b in budgets)
    ]
    return (
        "<h3>Seconds to an accuracy</h3>"
        + table(["variant", *(f"{goal:g} %" for goal in goals)], rows)
        + '<p class="note">Synthesis and distillation of the fastest budget that was run and reaches it, mean over '
        "seeds; in brackets images / steps.</p>"
    )


def _budget(budget: Budget | None) -> str:
    if budget is None:
        return "not reached"
    images = "fresh" if budget.images is None else f"{budget.images:,}"
    return f"{duration(budget.seconds)} ({images} / {budget.steps:,})"
