"""Open-licensed SVG icons to glyphs, glyphs to captioned grey-level images: the domain of the demonstration prior.

    python -m diffdfkd.recipes.render_icons glyphs --iconify package
    python -m diffdfkd.recipes.render_icons images --variants 46 --output icon-images

The reviewed list is ``assets/fashion/icons.json``; ``assets/fashion/ICONS.md`` names the sets, authors and licences.
`diffdfkd.recipes.icon_augmentation` makes images of the glyphs.
"""

import dataclasses
import io
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.command import run_command
from diffdfkd.recipes.icon_augmentation import GLYPH, augment

ASSETS = Path(__file__).parent / "assets" / "fashion"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LICENCES = ("MIT", "Apache-2.0", "CC0-1.0", "OFL-1.1", "CC-BY-4.0", "CC-BY-3.0")
DRAWN = 160
VARIANTS = 46
GENERAL_SHARE = 0.13
CANONICAL_SHARE = 0.75

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Icons as two 64x64 planes in the order of the list.

    ``luminance`` [N, 64, 64] holds inner detail relative to the icon's median tone, in [-1, 1]; ``silhouette``
    [N, 64, 64] the filled shape in [0, 1]. ``classes`` holds indices into `CLASSES`, -1 for general icons.
    """

    luminance: Tensor
    silhouette: Tensor
    words: tuple[str, ...]
    classes: Tensor

    def select(self, indices: Tensor) -> Tensor:
        """Planes of the chosen glyphs as `augment` takes them: [B, 2, 64, 64]."""
        return torch.stack((self.luminance[indices], self.silhouette[indices]), dim=1)


def read_list(path: Path = ASSETS / "icons.json") -> list[dict[str, Any]]:
    """The reviewed icons: ``set``, ``name``, ``licence`` (SPDX), ``word``, ``class`` or null, in glyph order."""
    return list(json.loads(path.read_text(encoding="utf-8")))


def load_glyphs(path: Path = ASSETS / "icons.npz") -> Glyphs:
    """Read the glyph asset and the list beside it (same stem, ``.json``); raises `UserError` when they disagree."""
    icons = read_list(path.with_suffix(".json"))
    with np.load(path, allow_pickle=False) as file:
        luminance, silhouette = file["luminance"], file["silhouette"]
    if len(icons) != len(luminance) or luminance.shape != silhouette.shape:
        raise UserError(
            f"{path}: holds {len(luminance)} glyphs, {path.with_suffix('.json').name} lists {len(icons)} icons; "
            "remake it with `python -m diffdfkd.recipes.render_icons glyphs`"
        )
    inside = torch.from_numpy(silhouette) > 127
    plane = torch.from_numpy(luminance).float() / 255
    median = plane.masked_fill(~inside, math.nan).flatten(1).nanmedian(dim=1).values.nan_to_num(0.5)
    classes = torch.tensor([CLASSES.index(i["class"]) if i["class"] else -1 for i in icons])
    detail = (plane - median[:, None, None]).masked_fill(~(torch.from_numpy(silhouette) > 0), 0)
    return Glyphs(detail, torch.from_numpy(silhouette).float() / 255, tuple(i["word"] for i in icons), classes)


def _grow(seed: NDArray[np.bool_], free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """All pixels of ``free`` that 4-connect to ``seed``; both [H, W]."""
    while True:
        grown = seed.copy()
        grown[1:] |= seed[:-1]
        grown[:-1] |= seed[1:]
        grown[:, 1:] |= seed[:, :-1]
        grown[:, :-1] |= seed[:, 1:]
        grown &= free
        if bool((grown == seed).all()):
            return seed
        seed = grown


def fill_silhouette(alpha: NDArray[np.float32], open_handle: bool = False) -> NDArray[np.float32]:
    """Coverage [H, W] in [0, 1] with closed outlines filled: all that the border cannot reach is inside.

    ``open_handle`` leaves closed holes of the upper half open, such as the one below a bag's handle.
    """
    ink = np.pad(alpha, 1) > 0.35
    border = np.zeros_like(ink)
    border[[0, -1], :] = border[:, [0, -1]] = True
    outside = _grow(border & ~ink, ~ink)
    if open_handle:
        rest, (height, width) = ~ink & ~outside, ink.shape
        while rest.any():
            seed = np.zeros_like(rest)
            seed[np.unravel_index(int(rest.argmax()), rest.shape)] = True
            hole = _grow(seed, rest)
            rest &= ~hole
            rows = np.nonzero(hole.any(axis=1))[0]
            if rows.mean() < 0.4 * height and rows.max() < 0.6 * height and hole.sum() < 0.2 * height * width:
                outside |= hole
    return np.maximum((~outside)[1:-1, 1:-1].astype(np.float32), alpha)


def icon_svg(collection: dict[str, Any], name: str) -> tuple[str, float, float]:
    """The icon's SVG text with its width and height, in black where the icon leaves its colour open.

    ``collection`` is one parsed IconifyJSON file; raises `KeyError` when it lacks the icon.
    """
    icon = collection["icons"][name]
    left, top, width, height = (
        icon.get(key, collection.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    return svg, width, height


def draw_glyph(
    svg: str, width: float, height: float, colours: bool, open_handle: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw an SVG cropped to its ink: luminance and silhouette, each uint8 [64, 64].

    Luminance is the grey of the colours for a coloured icon, the ink's coverage for a one-colour icon.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("resvg_py: not installed, and drawing SVG needs it; run `pip install resvg-py`") from error
    across, down = (DRAWN, None) if width >= height else (None, DRAWN)
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, width=across, height=down)
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32) / 255
    rows, columns = (np.nonzero((rgba[..., 3] > 0.1).any(axis=axis))[0] for axis in (1, 0))
    rgba = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    tall, wide = rgba.shape[:2]
    side = int(max(tall, wide) * GLYPH / (GLYPH - 3)) + 1
    frame = np.zeros((side, side, 4), dtype=np.float32)
    y, x = (side - tall) // 2, (side - wide) // 2
    frame[y : y + tall, x : x + wide] = rgba
    alpha = frame[..., 3]
    grey = frame[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    planes = (grey * alpha + 1 - alpha if colours else alpha, fill_silhouette(alpha, open_handle))
    small = [
        Image.fromarray((p * 255).round().astype(np.uint8)).resize((GLYPH, GLYPH), Image.Resampling.BOX) for p in planes
    ]
    luminance, silhouette = (np.asarray(image, dtype=np.uint8) for image in small)
    return luminance, silhouette


def caption(word: str) -> str:
    """The prior's caption for a word, "an icon of a sneaker"."""
    return f"an icon of {'an' if word[0] in 'aeiou' else 'a'} {word}"


def plan_images(glyphs: Glyphs, variants: int, seed: int) -> list[tuple[int, str]]:
    """Glyph index and caption of each image, shuffled.

    ``variants`` is the mean number of images per clothing icon; the ten classes get equally many images, and
    general icons the share `GENERAL_SHARE` of all.
    """
    chooser = random.Random(seed)
    classes = glyphs.classes.tolist()
    members = {label: [i for i, c in enumerate(classes) if c == label] for label in range(-1, len(CLASSES))}
    per_class = round(variants * sum(c >= 0 for c in classes) / len(CLASSES))
    general = round(per_class * len(CLASSES) * GENERAL_SHARE / (1 - GENERAL_SHARE)) if members[-1] else 0
    plan = []
    for label, icons in members.items():
        for number in range(per_class if label >= 0 else general):
            icon = icons[number % len(icons)]
            canonical = label >= 0 and chooser.random() < CANONICAL_SHARE
            plan.append((icon, caption(CLASSES[label] if canonical else glyphs.words[icon])))
    chooser.shuffle(plan)
    return plan


def write_images(glyphs: Glyphs, output: Path, variants: int, seed: int) -> int:
    """Write a captioned image folder (32x32 grey PNG, ``metadata.jsonl``) and return the number of images."""
    plan = plan_images(glyphs, variants, seed)
    generator = torch.Generator().manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for start in tqdm(range(0, len(plan), 256), desc="images", unit="batch", disable=None):
            chunk = plan[start : start + 256]
            images = augment(glyphs.select(torch.tensor([icon for icon, _ in chunk])), generator)
            pixels = (images[:, 0] * 255).round().byte().numpy()
            for number, (icon, text) in enumerate(chunk):
                name, label = f"{start + number:06d}.png", int(glyphs.classes[icon])
                Image.fromarray(pixels[number]).save(output / name, compress_level=1)
                row = {"file_name": name, "text": text, "class": CLASSES[label] if label >= 0 else None}
                metadata.write(json.dumps(row) + "\n")
    return len(plan)


def attribution(
    entries: list[dict[str, Any]], collections: dict[str, dict[str, Any]], version: str, images: int, seconds: float
) -> str:
    """The text of ICONS.md: how the glyphs were made, counts per class, and each set's authors and licence."""
    per_class = Counter(entry["class"] or "general" for entry in entries)
    lines = [
        "# Icons of the demonstration prior",
        "",
        f"`icons.json` lists {len(entries)} icons of the npm package `@iconify/json` {version}, found by keyword and",
        "then reviewed by eye on contact sheets. `icons.npz` holds them drawn with resvg: cropped, rasterised to 64x64",
        "grey, closed outlines filled, sixteen levels. Those are the changes made to the authors' work.",
        "",
        "```",
        f"npm pack @iconify/json@{version} && tar -xzf iconify-json-{version}.tgz",
        f"python -m diffdfkd.recipes.render_icons glyphs --iconify package    # {seconds:.0f} s on one core",
        "```",
        "",
        "| class | icons |",
        "|---|---|",
        *(f"| {name} | {per_class[name]} |" for name in (*CLASSES, "general")),
        "",
        f"The folder of images on which the prior is trained is made from `icons.npz` alone ({images:,} images, 13 s):",
        "",
        "```",
        f"python -m diffdfkd.recipes.render_icons images --variants {VARIANTS} --seed 0 --output icon-images",
        "```",
        "",
        "| set | icons | authors | licence |",
        "|---|---|---|---|",
    ]
    for name, count in sorted(Counter(entry["set"] for entry in entries).items()):
        info = collections[name]["info"]
        author, licence = info["author"], info["license"]
        lines.append(
            f"| {info['name']} (`{name}`) | {count} | {_link(author['name'], author.get('url'))} "
            f"| {_link(licence['spdx'], licence.get('url'))} |"
        )
    return "\n".join(lines) + "\n"


def _link(text: str, url: str | None) -> str:
    return f"[{text}]({url})" if url else text


@app.command("glyphs")
def glyphs_command(
    iconify: Annotated[Path, typer.Option(help="Unpacked npm package @iconify/json (the folder that holds json/).")],
    icons: Annotated[Path, typer.Option(help="Reviewed list of icons.")] = ASSETS / "icons.json",
) -> None:
    """Draw the listed icons; write the glyph asset and the attribution, ICONS.md, beside the list."""
    begun, entries = time.perf_counter(), read_list(icons)
    collections: dict[str, dict[str, Any]] = {}
    planes = []
    for entry in tqdm(entries, desc="glyphs", unit="icon", disable=None):
        path = iconify / "json" / f"{entry['set']}.json"
        if entry["set"] not in collections:
            if not path.is_file():
                raise UserError(f"--iconify: {path} not found; give the folder of the unpacked npm package")
            collections[entry["set"]] = json.loads(path.read_text(encoding="utf-8"))
        collection = collections[entry["set"]]
        licence = collection["info"]["license"].get("spdx")
        if licence != entry["licence"] or licence not in LICENCES:
            raise UserError(f"{icons}: {entry['set']} is under {licence}, listed {entry['licence']}; review the icon")
        svg, width, height = icon_svg(collection, entry["name"])
        colours = bool(collection["info"].get("palette"))
        planes.append(draw_glyph(svg, width, height, colours, entry.get("open_handle", False)))
    # Sixteen levels are plenty at 64x64 and halve the file.
    luminance, silhouette = ((np.stack(plane) // 17 * 17).astype(np.uint8) for plane in zip(*planes, strict=True))
    path = icons.with_suffix(".npz")
    np.savez_compressed(path, luminance=luminance, silhouette=silhouette)
    version = json.loads((iconify / "package.json").read_text(encoding="utf-8"))["version"]
    images = len(plan_images(load_glyphs(path), VARIANTS, seed=0))
    table = attribution(entries, collections, version, images, time.perf_counter() - begun)
    (icons.parent / "ICONS.md").write_text(table, encoding="utf-8")
    typer.echo(f"{path}: {len(planes)} glyphs, {path.stat().st_size / 1e6:.2f} MB")


@app.command("images")
def images_command(
    output: Annotated[Path, typer.Option(help="Folder to write: PNG files and metadata.jsonl.")],
    variants: Annotated[int, typer.Option(min=1, help="Images per clothing icon, on average.")] = VARIANTS,
    seed: Annotated[int, typer.Option(help="Seed of captions and augmentation.")] = 0,
) -> None:
    """Write the captioned image folder on which the prior is trained."""
    typer.echo(f"{output}: {write_images(load_glyphs(), output, variants, seed)} images")


if __name__ == "__main__":
    run_command(app)
