"""The report's part on diversity: how far apart a class's images lie, and which are almost the same."""

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from diffdfkd.engine.charts import bars
from diffdfkd.engine.gallery import opened, reading_shard
from diffdfkd.engine.page import Part, facts, picture
from diffdfkd.engine.quantities import figure, percent
from diffdfkd.engine.shards import read_sidecar

Content = Mapping[str, Any]

MOST_CLASSES = 20
MOST_PAIRS = 6
SHOWN_PIXELS = 64
UNRELATED = 2**0.5
"""Distance of two images that have nothing in common: the full length of a bar."""


def diversity_section(folder: Path, result: Content) -> Part | None:
    """From what `measure_diversity` found; None where it has not looked."""
    found: Content = result.get("diversity") or {}
    if not found:
        return None
    distance: Content = found.get("intra_class_distance") or {}
    doubles: Content = found.get("near_duplicates") or {}
    rows = [("Images looked at", f"{found['images']:,}")] if "images" in found else []
    if distance.get("mean") is not None:
        rows.append(("Distance within a class", figure(distance["mean"])))
    if doubles:
        rows.append(("Near-duplicates", f"{doubles.get('count', 0):,} ({percent(doubles.get('share'), 1)})"))
    beside: Content = found.get("beside_unguided") or {}
    rows += [*_beside_rows(beside), *_selection_rows(result.get("selection") or {})]
    by_class = zip(result.get("classes") or [], distance.get("per_class") or [], strict=False)
    measured = sorted((value, name) for name, value in by_class if value is not None)
    lines = [(name, value, f"{value:.2f}") for value, name in measured[:MOST_CLASSES]]
    chart = ""
    if lines:
        which = f", the {MOST_CLASSES} lowest" if len(measured) > MOST_CLASSES else ", lowest first"
        chart = f"<h3>Distance by class{which}</h3>{bars(lines, max(measured[-1][0], UNRELATED))}"
    body = (
        f"{''.join(_note(part.get('measure', '')) for part in (found, beside) if part)}"
        f'<div class="columns"><div>{facts(rows)}</div><div>{chart}</div></div>{_doubles(folder, doubles)}'
    )
    return Part("diversity", "Diversity", body)


def _note(measure: object) -> str:
    return f'<p class="note">{escape(str(measure))}.</p>'


def _beside_rows(beside: Content) -> list[tuple[str, str]]:
    """What `compare_sets` found, each figure with the one of unguided images that it is to be read beside."""
    if not beside:
        return []
    alike = f"(unguided among themselves {percent(beside.get('unguided'), 0)})"
    distance: Content = beside.get("intra_class_distance") or {}
    rows = [
        ("Recall of the prior's own images", f"{percent(beside.get('recall'), 0)} {alike}"),
        ("Precision beside them", f"{percent(beside.get('precision'), 0)} {alike}"),
    ]
    if distance.get("share") is not None:
        rows.append(("Distance within a class, to the teacher", f"{percent(distance['share'], 0)} of the unguided"))
    return rows


def _selection_rows(selection: Content) -> list[tuple[str, str]]:
    if not selection:
        return []
    dropped = [f"{count:,} dropped by {name}" for name, count in selection["dropped"].items()]
    counts = ", ".join([f"{selection['kept']:,} kept", *dropped])
    return [("Selected for the student", f"{counts}; they weigh as {selection['effective_sample_size']:,.0f} would")]


def _doubles(folder: Path, doubles: Content) -> str:
    pairs = [tuple(pair) for pair in (doubles.get("examples") or [])[:MOST_PAIRS]]
    images = _pictures(folder, {index for pair in pairs for index in pair})
    shown = [
        f'<div class="pair">{picture(images[first], f"image {first}", SHOWN_PIXELS)}'
        f"{picture(images[second], f'image {second}, almost the same', SHOWN_PIXELS)}"
        f"<span>{first}</span><span>{second}</span></div>"
        for first, second in pairs
        if first in images and second in images
    ]
    return f'<h3>Nearly the same</h3><div class="pairs">{"".join(shown)}</div>' if shown else ""


def _pictures(folder: Path, indices: set[int]) -> dict[int, bytes]:
    """PNG of the images of these indices in the run's shards, all rounds on end."""
    found: dict[int, bytes] = {}
    first = 0
    for sidecar in sorted((folder / "synthetic").glob("round-*/shard-*.json")):
        with reading_shard(sidecar):
            count = read_sidecar(sidecar).images
        wanted = {index - first: index for index in indices if first <= index < first + count}
        first += count
        if not wanted or not (tar := sidecar.with_suffix(".tar")).is_file():
            continue
        with opened(tar) as shard:
            members = (member for member in shard if not member.name.endswith(".json"))
            for place, member in enumerate(members):
                if place in wanted and (stream := shard.extractfile(member)):
                    found[wanted[place]] = _small(stream.read())
    return found


def _small(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((2 * SHOWN_PIXELS, 2 * SHOWN_PIXELS))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return stream.getvalue()
