"""A chart of the report as an SVG file of its own, for a page that brings no style."""

import re

COLOURS = ("#2857c8", "#c8552b", "#2c8a57", "#8a4fb8")
INK, MUTED, LINE = "#1d1d1f", "#6b6b70", "#e4e2dd"

_FIGURE = re.compile(
    r"<figcaption><b>(?P<title>.*?)</b><span class=\"legend\">(?P<legend>.*?)</span></figcaption>"
    r"<svg viewBox=\"0 0 (?P<width>[\d.]+) (?P<height>[\d.]+)\"(?P<attributes>[^>]*)>(?P<drawing>.*)</svg>",
    re.DOTALL,
)
_KEY = re.compile(r'<span class="k(\d)">(.*?)</span>')

TITLE, KEY, LETTER = 22, 18, 6.2
"""Pixels: height of the title and of a row of the legend, mean width of a letter."""


def standalone(figure: str, width: int) -> str:
    """The `<figure>` of a chart, caption and legend drawn into it, ``width`` pixels wide; raises ValueError for others.

    Light colours on white, since an image on a page cannot ask which of both the page has.
    """
    found = _FIGURE.search(figure)
    if found is None:
        raise ValueError("no chart: an empty figure, or one without caption")
    across, up = float(found["width"]), float(found["height"])
    keys, rows = _legend(_KEY.findall(found["legend"]), across)
    top = TITLE + KEY * rows
    styles = [
        f"text {{ font: 11px system-ui, sans-serif; fill: {MUTED}; }}",
        f".title {{ font-weight: 600; font-size: 12.5px; fill: {INK}; }}",
        f".grid {{ stroke: {LINE}; stroke-width: 1; }}",
        "polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }",
        *(f".s{place} {{ stroke: {colour}; }} .c{place} {{ fill: {colour}; }}" for place, colour in enumerate(COLOURS)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:g} {up + top:g}" width="{width}" '
        f'height="{width * (up + top) / across:.0f}"{found["attributes"]}>'
        f'<style>{" ".join(styles)}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="8" y="15">{found["title"]}</text>{keys}'
        f'<g transform="translate(0 {top - 16})">{found["drawing"]}</g></svg>\n'
    )


def _legend(keys: list[tuple[str, str]], width: float) -> tuple[str, int]:
    """Coloured names in as many rows as they need, and how many these are."""
    parts, x, row = [], 8.0, 1
    for place, name in keys:
        wide = 18 + LETTER * len(name) + 14
        if x > 8 and x + wide > width:
            x, row = 8.0, row + 1
        y = TITLE + KEY * row - 8
        parts.append(f'<rect x="{x:.0f}" y="{y - 5}" width="13" height="3" fill="{COLOURS[int(place)]}"/>')
        parts.append(f'<text x="{x + 18:.0f}" y="{y}">{name}</text>')
        x += wide
    return "".join(parts), row if keys else 0
