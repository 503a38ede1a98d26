"""Pictures of numbers for the report: line charts as inline SVG, bars and heat tables as HTML; strings are escaped."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 30
MOST_POINTS = 300


def line_chart(title: str, series: Mapping[str, Points], across: str) -> str:
    """SVG of one or more named curves over a common x axis; points that are not finite are left out.

    The y axis begins at zero where all values are positive. Long curves are averaged down to 300 points.
    """
    drawn = {name: thinned(points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(0.0, min(ys)), max(ys), 4)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-12)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def across_at(x: float) -> float:
        share = 0.5 if max(xs) == min(xs) else (x - x_low) / (x_high - x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = up_at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    whole = all(x == int(x) for x in xs)  # steps and shards have no halves
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        if x_low <= tick <= x_high and not (whole and tick != int(tick)):
            x = across_at(tick)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(across)}</text>')
    for index, points in enumerate(drawn.values()):
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle class="c{index % 4}" cx="{across_at(x):.1f}" cy="{up_at(y):.1f}" r="3"/>')
            continue
        path = " ".join(f"{across_at(x):.1f},{up_at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="s{index % 4}" points="{path}"/>')
    parts.append("</svg>")
    legend = "".join(f'<span class="k{index % 4}">{escape(name)}</span>' for index, name in enumerate(drawn))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="legend">{legend}</span></figcaption>'
        f"{''.join(parts)}</figure>"
    )


def thinned(points: Points) -> list[tuple[float, float]]:
    """The finite points in order of x, averaged in equal groups so that at most 300 are left."""
    finite = sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    group = math.ceil(len(finite) / MOST_POINTS)
    if group <= 1:
        return finite
    groups = [finite[start : start + group] for start in range(0, len(finite), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in groups]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` + 1 round numbers, the first at or below ``low`` and the last at or above ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """One notation for all ticks of an axis, with as many digits as tell them apart: 1500, 0.25, 2.5e-04."""
    highest = max(abs(value) for value in values)
    power = "g" if 1e-3 <= highest < 1e6 else "e"
    labels: list[str] = []
    for digits in range(7):
        labels = [f"{value:.{digits + (power == 'g')}{power}}" if value else "0" for value in values]
        plain = all(abs(float(label) - value) <= 1e-3 * highest for label, value in zip(labels, values, strict=True))
        if plain and len(set(labels)) == len(labels) and not (power == "g" and any("e" in label for label in labels)):
            break
    return labels


def bars(rows: Sequence[tuple[str, float, str]], highest: float) -> str:
    """Horizontal bars of (label, value, printed value); a value of ``highest`` fills the width."""
    lines = []
    for label, value, printed in rows:
        share = 0 if highest <= 0 else max(0.0, min(1.0, value / highest))
        lines.append(
            f'<div class="bar"><span>{escape(label)}</span><i><b style="width:{share * 100:.1f}%"></b></i>'
            f"<span>{escape(printed)}</span></div>"
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def reliability_chart(title: str, bins: Sequence[Mapping[str, Any]]) -> str:
    """SVG of accuracy by bin of confidence, the diagonal of a calibrated answer, and below the images of each bin.

    A bin has ``low`` and ``high`` edge, ``images``, and ``accuracy``, which is None without images.
    """
    floor, top, counts = 200, 16, 46
    span, most = WIDTH - LEFT - RIGHT, max((row["images"] for row in bins), default=0) or 1

    def up_at(share: float) -> float:
        return floor - share * (floor - top)

    parts = [f'<svg viewBox="0 0 {WIDTH} {floor + counts + 34}" role="img" aria-label="{escape(title)}">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + share * span, up_at(share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{share:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{floor + counts + 16}" text-anchor="middle">{share:g}</text>')
    for row in bins:
        if not row["images"]:
            continue
        x, width = LEFT + row["low"] * span + 1, (row["high"] - row["low"]) * span - 2
        y, deep = up_at(row["accuracy"]), max(1.0, row["images"] / most * (counts - 8))
        words = f"confidence {row['confidence']:.2f}, accuracy {row['accuracy']:.2f}, {row['images']} images"
        bar = f'x="{x:.1f}" width="{width:.1f}"'
        parts.append(f'<rect {bar} y="{y:.1f}" height="{floor - y:.1f}"><title>{escape(words)}</title></rect>')
        parts.append(f'<rect class="counts" {bar} y="{floor + 4}" height="{deep:.1f}"/>')
    parts.append(f'<line class="ideal" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{top}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{floor + counts + 31}" text-anchor="end">confidence</text>')
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span>bars: accuracy; dashes: as sure as right; '
        f"below: images</span></figcaption>{''.join(parts)}</svg></figure>"
    )


def heat_table(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Confusion matrix: rows are the true class, columns the answer, shaded by the share of the row."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in classes)
    body = []
    for name, row in zip(classes, counts, strict=True):
        total = sum(row) or 1
        cells = []
        for answer, count in zip(classes, row, strict=True):
            share = 100 * count / total
            strong = ' class="strong"' if share > 55 else ""
            label = f"{name} taken for {answer}: {count} of {sum(row)}"
            cells.append(f'<td{strong} style="--v:{share:.1f}%" title="{escape(label)}">{count or ""}</td>')
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
