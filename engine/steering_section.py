"""The report's part on guidance: which BatchNorm layers drive it, how statistics moved, what the teacher saw."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffdfkd.engine.charts import line_chart
from diffdfkd.engine.page import Part, fold, table
from diffdfkd.engine.quantities import NONE, counted, figure, percent

Content = Mapping[str, Any]

LOSSES = (("class", "class loss"), ("batchnorm", "BatchNorm loss"), ("adversarial", "student's disagreement"))
MOST_LAYERS = 60
MOST_CLASSES = 40


def steering_section(preview: Content, rows: Sequence[Content]) -> Part | None:
    """From ``preview.json`` and the losses in the journal; None where neither has anything to say."""
    charts = [chart for name, title in LOSSES if (chart := guidance_chart(rows, name, title))]
    drawn = (
        '<h3>The losses over the run</h3><p class="note">Means of a shard, at the first and the last guided step.</p>'
        f'<div class="charts">{"".join(charts)}</div>'
        if charts
        else ""
    )
    body = _layers(preview) + _by_class(preview) + drawn
    return Part("steering", "What steered it", body) if body else None


def guidance_chart(rows: Sequence[Content], name: str, title: str) -> str:
    """A guidance loss at the first and the last guided step, across the shards in the order of the data set."""
    shards: dict[tuple[int, int], Content] = {}
    for row in rows:
        if row["event"] == "shard" and row.get("losses"):
            shards[row["round"], row["shard"]] = row["losses"]
    series: dict[str, list[tuple[float, float]]] = {"first guided step": [], "last guided step": []}
    for place, key in enumerate(sorted(shards)):
        for which, points in zip(("first", "last"), series.values(), strict=True):
            value = (shards[key].get(which) or {}).get(name)
            if value is not None:
                points.append((place, value))
    if all(value == 0 for points in series.values() for _, value in points):
        return ""
    return line_chart(f"guidance: {title}", series, "shard")


def _loss(layer: Content, kind: str) -> float | None:
    """The layer's summand of L_bn: distance of the means and of the variances."""
    parts = layer.get(kind) or {}
    mean, variance = parts.get("mean"), parts.get("variance")
    return None if mean is None or variance is None else mean + variance


def _layers(preview: Content) -> str:
    """A row for each layer: L_bn without and with guidance on one scale, and the layer's share of it."""
    layers = [layer for layer in preview.get("layers") or [] if _loss(layer, "unguided") is not None]
    if not layers:
        return ""
    unguided = [_loss(layer, "unguided") or 0.0 for layer in layers]
    guided = [_loss(layer, "guided") for layer in layers]
    total = sum(unguided)
    highest = max(*unguided, *(value for value in guided if value is not None), 1e-12)
    shown = sorted(sorted(range(len(layers)), key=lambda i: -unguided[i])[:MOST_LAYERS])
    moves = [_move(layers[i], unguided[i], guided[i], highest, total) for i in shown]
    leading = sorted(range(len(layers)), key=lambda i: -unguided[i])[:3]
    words = ", ".join(f"{layers[i]['name']} ({percent(unguided[i] / total, 0)})" for i in leading) if total else NONE
    # Those of the run's preview, computed in one batch: what stands there, or else the sum over the layers.
    both = preview.get("batchnorm") or {"unguided": total, "guided": None}
    moved = (
        f"The teacher's BatchNorm loss of the preview's images is {figure(both.get('unguided'))} without and "
        f"{figure(both['guided'])} with guidance. "
        if both.get("guided") is not None
        else f"The teacher's BatchNorm loss of the preview's images is {figure(both.get('unguided'))}. "
    )
    rest = f" The {MOST_LAYERS} largest of {len(layers)} layers." if len(shown) < len(layers) else ""
    note = (
        f"{moved}It is summed over the layers, and guidance follows its gradient. Most of it without guidance: "
        f"{words}. A layer's share says how much of the loss is its own, and not how far its gradient reaches.{rest}"
    )
    numbers = table(
        ("layer", "channels", "mean, unguided", "mean, guided", "variance, unguided", "variance, guided"),
        [
            (
                str(layers[i]["name"]),
                str(layers[i].get("channels", NONE)),
                *(
                    figure((layers[i].get(kind) or {}).get(part))
                    for part in ("mean", "variance")
                    for kind in ("unguided", "guided")
                ),
            )
            for i in shown
        ],
    )
    legend = (
        '<p class="note"><span class="key from"></span> without guidance &nbsp; <span class="key"></span> with '
        "guidance &nbsp; share of the loss without guidance</p>"
    )
    return (
        f'<h3>BatchNorm statistics by layer</h3><p class="note">{escape(note)}</p>{legend}'
        f'<div class="moves">{"".join(moves)}</div>{fold("Distances of means and variances", numbers)}'
    )


def _move(layer: Content, before: float, after: float | None, highest: float, total: float) -> str:
    start, end = (100 * value / highest for value in (before, before if after is None else after))
    to = "" if after is None else f'<b class="to" style="left:{end:.1f}%"></b>'
    channels = f" <small>{escape(str(layer['channels']))}</small>" if "channels" in layer else ""
    values = figure(before) if after is None else f"{figure(before)} → {figure(after)}"
    return (
        f'<div class="move"><span>{escape(str(layer["name"]))}{channels}</span><div class="track">'
        f'<u style="left:{min(start, end):.1f}%;width:{abs(end - start):.1f}%"></u>'
        f'<b class="from" style="left:{start:.1f}%"></b>{to}</div>'
        f"<span>{escape(values)}</span><span>{percent(before / total if total else 0, 0)}</span></div>"
    )


def _by_class(preview: Content) -> str:
    """The teacher's confidence in the intended class, and how often it is its answer."""
    classes = [row for row in preview.get("by_class") or [] if row.get("unguided")]
    if not classes:
        return ""
    shown = sorted(classes, key=lambda row: (row.get("guided") or row["unguided"]).get("confidence") or 0.0)
    rest = f" The {MOST_CLASSES} least certain of {len(classes)}." if len(classes) > MOST_CLASSES else ""
    shown = sorted(shown[:MOST_CLASSES], key=lambda row: row.get("class", 0)) if rest else classes
    lines = [
        (
            str(row["class_name"]),
            *(
                percent((row.get(kind) or {}).get(name), 1)
                for name in ("confidence", "agreement")
                for kind in ("unguided", "guided")
            ),
        )
        for row in shown
    ]
    head = ("class", "confidence, unguided", "guided", "its answer, unguided", "guided")
    images = ((preview.get("signs") or {}).get("unguided") or {}).get("images")
    few = f", of the preview's {counted(images, 'image')} in all" if images else ""
    return (
        '<h3>What the teacher takes the images for</h3><p class="note">Its mean probability of the class that was '
        f"asked for, and the share of images that it puts into that class{few}.{rest}</p>{table(head, lines)}"
    )
