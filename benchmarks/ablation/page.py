"""``ablation.html``: what is resolved in words, then a chart and the tables of each axis; it loads nothing."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from diffdfkd.benchmarks.ablation.axis import Axis
from diffdfkd.benchmarks.ablation.budget_section import budget_section
from diffdfkd.benchmarks.ablation.tables import Cell, resolved
from diffdfkd.benchmarks.statistics import t_interval
from diffdfkd.engine.interval_chart import Mean, interval_dots
from diffdfkd.engine.page import Part, page, table
from diffdfkd.engine.quantities import NONE, counted, duration, rate

FEWEST_SEEDS = 3
"""Below, an interval over seeds says next to nothing and is not drawn."""


def ablation_page(
    recipe: str,
    axes: Sequence[Axis],
    cells: Sequence[Cell],
    pairs: Sequence[Mapping[str, Any]],
    judged: str,
    images: int,
) -> str:
    """The document; ``judged`` names the real images, of which there are ``images``."""
    seeds = max(len(cell.runs) for cell in cells)
    runs = len({run.digest for cell in cells for run in cell.runs})
    summary = "".join(f"<p>{escape(_in_words(axis, pairs, seeds))}</p>" for axis in axes)
    head = (
        f'<header><h1>Ablation of {escape(recipe)}</h1><p class="muted">{counted(runs, "run")}, '
        f"{counted(seeds, 'seed')}; student accuracy on {images:,} real images of {escape(judged)}, read once a run."
        f"</p>{summary}</header>"
    )
    parts = [
        Part(axis.name, f"{axis.name}: {axis.about}" if axis.about else axis.name, _axis(axis, cells, pairs))
        for axis in axes
    ]
    return page(f"Ablation of {recipe}", head, parts)


def mean_of(values: np.ndarray) -> Mean:
    """With Student's interval over seeds, where there are enough of them."""
    low, high = t_interval(values) if len(values) >= FEWEST_SEEDS else (math.nan, math.nan)
    return Mean(float(values.mean()), low, high)


def _in_words(axis: Axis, pairs: Sequence[Mapping[str, Any]], seeds: int) -> str:
    own = [row for row in pairs if row["axis"] == axis.name]
    if not own:
        return f"{axis.name}: one variant, with nothing to compare."
    if seeds == 1:
        return (
            f"{axis.name}: one seed, so that nothing is resolved: a difference below may be that of two draws of "
            "images and weights."
        )
    start = f"{axis.name}, in points against {axis.reference}, with the 95 % interval over seeds and test images."
    if len({(row["images"], row["steps"]) for row in own}) > 1:
        variants = dict.fromkeys(row["variant"] for row in own)
        lines = [_over_budgets(name, [row for row in own if row["variant"] == name]) for name in variants]
        return f"{start} {' '.join(lines)}"
    clear = [_said(row) for row in own if resolved(row)]
    open_ = [_said(row) for row in own if not resolved(row)]
    sentences = [start, f"Resolved: {'; '.join(clear)}." if clear else "Nothing is resolved."]
    return " ".join([*sentences, f"Not resolved: {'; '.join(open_)}."] if open_ else sentences)


def _said(row: Mapping[str, Any]) -> str:
    return (
        f"{row['variant']} {_signed(row['points'])} "
        f"({_signed(row['bootstrap95_low'])} to {_signed(row['bootstrap95_high'])})"
    )


def _over_budgets(variant: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """At how many budgets a variant is above and below the reference, and by what means."""
    kinds = {
        "above": [row["points"] for row in rows if resolved(row) and row["points"] > 0],
        "below": [row["points"] for row in rows if resolved(row) and row["points"] < 0],
        "not resolved": [row["points"] for row in rows if not resolved(row)],
    }
    said = [
        f"{kind} at {len(points)} of {len(rows)} budgets ({_signed(min(points))} to {_signed(max(points))})"
        for kind, points in kinds.items()
        if points
    ]
    return f"{variant}: {', '.join(said)}."


def _axis(axis: Axis, cells: Sequence[Cell], pairs: Sequence[Mapping[str, Any]]) -> str:
    own = [cell for cell in cells if cell.axis == axis.name]
    budgets = {(cell.images, cell.steps) for cell in own if cell.images is not None}
    if len(budgets) > 1:
        charts = budget_section(axis, own, mean_of)
    else:
        rows = {cell.variant: (mean_of(cell.accuracy), cell.accuracy.tolist()) for cell in own}
        charts = f'<div style="max-width: 700px">{interval_dots("Student accuracy", rows, "per cent")}</div>'
    note = (
        '<p class="note">Bars: 95 % interval of the mean by Student\'s t over seeds, from three seeds on; faint dots: '
        "single runs. Seconds are of synthesis and distillation; images that several runs share are counted for each."
        "</p>"
    )
    pair_rows = [_pair_cells(row) for row in pairs if row["axis"] == axis.name]
    compared = ""
    if pair_rows:
        head = ["variant", "images", "steps", "points", "95 % bootstrap", "95 % t", "alone right", "McNemar p"]
        compared = (
            f"<h3>Against {escape(axis.reference)}, paired by seed and test image</h3>{table(head, pair_rows)}"
            '<p class="note">The bootstrap draws seeds and test images; t is over seeds alone. Alone right: test '
            "images that only the variant, and only the reference, has right, pooled over seeds. McNemar's p takes "
            "the answers of several seeds to one image for independent: read it beside the intervals.</p>"
        )
    return f"{charts}{note}<h3>Runs</h3>{table(_HEAD, [_cell_row(cell) for cell in own])}{compared}"


_HEAD = [
    *("variant", "images", "steps", "seeds", "accuracy", "agreement", "images/s"),
    *("synthesis", "distillation", "evaluations/image"),
]


def _cell_row(cell: Cell) -> list[str]:
    accuracy = cell.accuracy
    spread = f" ± {accuracy.std(ddof=1):.2f}" if len(accuracy) > 1 else ""
    rates = [row["images_per_second"] for row in cell.rows if row["images_per_second"]]
    evaluations = cell.values("network_evaluations").mean()
    return [
        cell.variant,
        "fresh" if cell.images is None else f"{cell.images:,}",
        f"{cell.steps:,}",
        str(len(accuracy)),
        f"{accuracy.mean():.2f}{spread}",
        f"{100 * cell.values('agreement').mean():.2f}",
        rate(float(np.mean(rates))) if rates else NONE,
        duration(float(cell.values("synthesis_seconds").mean())),
        duration(float(cell.values("distillation_seconds").mean())),
        f"{evaluations:g}" if evaluations else NONE,
    ]


def _pair_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["variant"],
        f"{row['images']:,}" if row["images"] is not None else "fresh",
        f"{row['steps']:,}",
        _signed(row["points"]),
        f"{_signed(row['bootstrap95_low'])} to {_signed(row['bootstrap95_high'])}",
        f"{_signed(row['t95_low'])} to {_signed(row['t95_high'])}" if row["t95_low"] is not None else NONE,
        f"{row['only_variant']:,} / {row['only_reference']:,}",
        f"{row['mcnemar_p']:.3g}",
    ]


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")
