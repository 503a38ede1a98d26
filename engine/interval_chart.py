"""Charts of means with their intervals, as inline SVG in the look of the report; strings are escaped."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from diffdfkd.engine.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, tick_labels, ticks


class Mean(NamedTuple):
    """A mean and its interval; NaN ends where there is none."""

    value: float
    low: float
    high: float


Curve = Sequence[tuple[float, Mean]]

LABELS, VALUES, ROW = 190, 128, 24
"""Of a dot chart: pixels of the names, of the printed values, and from row to row."""


def interval_curves(title: str, series: Mapping[str, Curve], levels: Mapping[str, Mean], across: str) -> str:
    """Named curves over a logarithmic x axis, marked at their points, and dashed levels that do not depend on x."""
    xs = [x for curve in series.values() for x, _ in curve]
    if not xs:
        return ""
    means = [*(mean for curve in series.values() for _, mean in curve), *levels.values()]
    y_ticks = ticks(*_range(means), 4)

    def across_at(x: float) -> float:
        span = math.log(max(xs) / min(xs))
        share = math.log(x / min(xs)) / span if span else 0.5
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)

    def up_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = up_at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in _log_ticks(min(xs), max(xs)):
        parts.append(f'<text x="{across_at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(across)}</text>')
    legend = []
    for index, (name, curve) in enumerate(series.items()):
        # A fifth curve has the first one's colour, and is dashed.
        dashes = f' stroke-dasharray="{2 * (index // 4)} {3 * (index // 4)}"' if index >= 4 else ""
        points = [(across_at(x), mean) for x, mean in sorted(curve)]
        path = " ".join(f"{x:.1f},{up_at(mean.value):.1f}" for x, mean in points)
        parts.append(f'<polyline class="s{index % 4}"{dashes} points="{path}"/>')
        for x, mean in points:
            parts += _upright(x, up_at(mean.low), up_at(mean.high), index, mean)
            words = f"{name}: {mean.value:.2f}"
            parts.append(
                f'<circle class="c{index % 4}" cx="{x:.1f}" cy="{up_at(mean.value):.1f}" r="3">'
                f"<title>{escape(words)}</title></circle>"
            )
        legend.append(f'<span class="k{index % 4}">{escape(name)}{" (dashed)" if dashes else ""}</span>')
    for index, (name, mean) in enumerate(levels.items(), start=len(series)):
        y = up_at(mean.value)
        parts.append(
            f'<polyline class="s{index % 4}" stroke-dasharray="7 4" points="{LEFT},{y:.1f} {WIDTH - RIGHT},{y:.1f}"/>'
        )
        legend.append(f'<span class="k{index % 4}">{escape(name)} (level)</span>')
    return _figure(title, "".join(parts), "".join(legend))


def interval_dots(title: str, rows: Mapping[str, tuple[Mean, Sequence[float]]], across: str) -> str:
    """A row for each name: its mean, interval and single values, which lie around it as faint dots."""
    if not rows:
        return ""
    means = [mean for mean, _ in rows.values()]
    singles = [Mean(value, value, value) for _, values in rows.values() for value in values]
    x_ticks = ticks(*_range([*means, *singles]), 4)
    wide, floor = 640, 12 + ROW * len(rows)

    def across_at(x: float) -> float:
        return LABELS + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (wide - LABELS - VALUES)

    parts = [f'<svg viewBox="0 0 {wide} {floor + 34}" role="img" aria-label="{escape(title)}">']
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = across_at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{wide - VALUES}" y="{floor + 31}" text-anchor="end">{escape(across)}</text>')
    for index, (name, (mean, values)) in enumerate(rows.items()):
        y = 16 + ROW * index
        shown = name if len(name) <= 30 else name[:29] + "…"
        parts.append(f'<text x="{LABELS - 12}" y="{y + 3.5}" text-anchor="end">{escape(shown)}</text>')
        if math.isfinite(mean.low) and math.isfinite(mean.high):
            low, high = across_at(mean.low), across_at(mean.high)
            parts.append(f'<polyline class="s0" points="{low:.1f},{y} {high:.1f},{y}"/>')
        for value in values:
            parts.append(f'<circle class="c1" opacity="0.45" cx="{across_at(value):.1f}" cy="{y}" r="2.5"/>')
        parts.append(f'<circle class="c0" cx="{across_at(mean.value):.1f}" cy="{y}" r="4"/>')
        parts.append(f'<text x="{wide}" y="{y + 3.5}" text-anchor="end">{_printed(mean)}</text>')
    return _figure(title, "".join(parts), "")


def _figure(title: str, drawing: str, legend: str) -> str:
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="legend">{legend}</span></figcaption>'
        f"{drawing}</svg></figure>"
    )


def _printed(mean: Mean) -> str:
    half = f" ± {(mean.high - mean.low) / 2:.2f}" if math.isfinite(mean.high - mean.low) else ""
    return f"{mean.value:.2f}{half}"


def _range(means: Sequence[Mean]) -> tuple[float, float]:
    finite = [value for mean in means for value in mean if math.isfinite(value)]
    return min(finite), max(finite)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, ... inside of the range; its ends where there are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [factor * 10.0**power for power in powers for factor in (1, 3) if low <= factor * 10.0**power <= high]
    return inside if len(inside) > 1 else sorted({low, high})


def _upright(x: float, low: float, high: float, index: int, mean: Mean) -> list[str]:
    """An error bar with its two ends."""
    if not (math.isfinite(mean.low) and math.isfinite(mean.high)):
        return []
    kind = f'class="s{index % 4}" opacity="0.6"'
    return [
        f'<polyline {kind} points="{x:.1f},{low:.1f} {x:.1f},{high:.1f}"/>',
        *(f'<polyline {kind} points="{x - 3:.1f},{y:.1f} {x + 3:.1f},{y:.1f}"/>' for y in (low, high)),
    ]
