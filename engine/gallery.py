"""The report's pictures: guided beside unguided, CutMix parents and child, what the student saw."""

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.page import Part, picture
from diffdfkd.engine.shards import DamagedShard, read_sidecar

Content = dict[str, Any]

PER_CLASS = 12
"""Images of each class cut from the shards."""
MOST_CLASSES = 40
SHARDS_READ = 20
SHOWN_PIXELS = 96
"""Largest edge of an embedded image; larger ones are scaled down, so that the page stays small."""


@contextmanager
def reading_shard(file: Path) -> Iterator[None]:
    """What a damaged tar or sidecar raises, as a UserError that names the file."""
    try:
        yield
    # A broken PNG is a SyntaxError to PIL.
    except (
        *(tarfile.TarError, OSError, SyntaxError, ValueError, AttributeError),
        *(Image.DecompressionBombError, DamagedShard),
    ) as error:
        raise UserError(
            f"{file}: damaged; give the command of the run again, which makes the shard anew ({error})"
        ) from None


@contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """The tar of a shard; UserError where it, or its sidecar, is damaged. Reading a cut tar may just end early."""
    with reading_shard(path.with_suffix(".json")):
        size = read_sidecar(path).bytes
    with reading_shard(path), tarfile.open(path, "r:") as tar:
        if path.stat().st_size != size:
            raise tarfile.ReadError(f"{path.stat().st_size} bytes, its sidecar says {size}")
        yield tar


def guidance_gallery(folder: Path, preview: Content) -> Part | None:
    """Samples of each class unguided beside guided from the same noise; nothing without a preview."""
    if not preview.get("pairs"):
        return None
    size = _shown(preview["size"])
    by_class: dict[str, list[Content]] = defaultdict(list)
    for pair in preview["pairs"]:
        by_class[pair["class_name"]].append(pair)
    guided = any(pair["guided"] for pair in preview["pairs"])
    blocks = []
    for name, pairs in by_class.items():
        shown = []
        for pair in pairs:
            kinds = ("unguided", "guided") if guided else ("unguided",)
            cells = [picture(_embedded(folder / "preview", pair[kind]), f"{name}, {kind}", size) for kind in kinds]
            captions = "".join(f"<span>{kind}</span>" for kind in kinds)
            shown.append(f'<div class="pair">{"".join(cells)}{captions}</div>')
        blocks.append(f'<div><h3>{escape(name)}</h3><div class="pairs">{"".join(shown)}</div></div>')
    note = (
        "Left and right begin with the same noise and prompt; the right one was steered by the teacher."
        if guided
        else "Guidance was off in this run."
    )
    body = f'<p class="note">{note}</p><div class="classes">{"".join(blocks)}</div>'
    return Part("guidance", "What guidance does", body)


def cutmix_gallery(folder: Path, preview: Content) -> Part | None:
    """Owner, partner and child of a few mixes, the box outlined; nothing where CutMix was off."""
    if not preview.get("mixes"):
        return None
    size = _shown(preview["size"])
    scale = size / preview["size"]
    blocks = []
    for mix in preview["mixes"]:
        figures = []
        for kind, caption in (
            ("owner", mix["owner_class"]),
            ("partner", mix["partner_class"]),
            ("child", "mixed: " + f"{1 - mix['area']:.0%} + {mix['area']:.0%}"),
        ):
            image = picture(_embedded(folder / "preview", mix[kind]), f"{kind}: {caption}", size)
            if kind != "owner":
                top, left, bottom, right = (round(edge * scale) for edge in mix["box"])
                place = f"top:{top}px;left:{left}px;width:{right - left}px;height:{bottom - top}px"
                image = f'<div class="boxed">{image}<i style="{place}"></i></div>'
            figures.append(f"<figure>{image}<span>{escape(caption)}</span></figure>")
        blocks.append(f'<div class="mix">{"".join(figures)}</div>')
    body = (
        '<p class="note">The box of the partner&#39;s latent is put into the owner&#39;s while both are still noise; '
        "the steps that follow repair the seam. From left to right: owner, partner, child.</p>"
        f'<div class="mixes">{"".join(blocks)}</div>'
    )
    return Part("mixes", "CutMix", body)


def training_gallery(folder: Path, classes: list[str]) -> Part | None:
    """A strip of images of each class, the first ones in the shards."""
    found: dict[int, list[Image.Image]] = defaultdict(list)
    # A shard is there once its sidecar is, which comes last.
    sidecars = (folder / "synthetic").glob("round-*/shard-*.json")
    for tar in [file.with_suffix(".tar") for file in sorted(sidecars)][:SHARDS_READ]:
        if tar.is_file():
            _collect(tar, found, len(classes))
        if all(len(found[label]) >= PER_CLASS for label in range(min(len(classes), MOST_CLASSES))):
            break
    lines = []
    for label, name in enumerate(classes[:MOST_CLASSES]):
        if not found[label]:
            continue
        strip, width, height = _strip(found[label])
        image = (
            picture(strip, f"synthetic images of {name}", width)
            .replace(f'height="{width}"', f'height="{height}"', 1)
            .replace("<img", '<img class="strip"', 1)
        )
        lines.append(f"<span>{escape(name)}</span>{image}")
    if not lines:
        return None
    rest = f" The first {MOST_CLASSES} of {len(classes)} classes." if len(classes) > MOST_CLASSES else ""
    body = (
        '<p class="note">The first images of each class in the shards, as asked for in the prompt.'
        f'{rest}</p><div class="strips">{"".join(lines)}</div>'
    )
    return Part("images", "What the student saw", body)


def _collect(path: Path, found: dict[int, list[Image.Image]], classes: int) -> None:
    """Put the tar's images into ``found`` by their class, until each class has enough."""
    image: bytes | None = None
    with opened(path) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            content = stream.read() if stream else b""
            if not member.name.endswith(".json"):
                image = content
                continue
            label = json.loads(content).get("class")
            if image is not None and isinstance(label, int) and 0 <= label < classes and len(found[label]) < PER_CLASS:
                picture_ = Image.open(io.BytesIO(image))
                picture_.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
                found[label].append(picture_.convert("L" if picture_.mode == "L" else "RGB"))
            image = None


def _strip(images: list[Image.Image]) -> tuple[bytes, int, int]:
    """PNG of a class's images side by side with gaps, always as wide as ``PER_CLASS`` of them; width and height."""
    edge, gap = images[0].width, max(1, images[0].width // 16)
    strip = Image.new("LA" if images[0].mode == "L" else "RGBA", (PER_CLASS * (edge + gap) - gap, images[0].height))
    for place, image in enumerate(images):
        strip.paste(image.convert(strip.mode), (place * (edge + gap), 0))
    stream = io.BytesIO()
    strip.save(stream, "PNG", optimize=True)
    return stream.getvalue(), strip.width, strip.height


def _embedded(folder: Path, name: str | None) -> bytes | None:
    """Bytes of a preview image, scaled down where it is large."""
    path = folder / Path(name).name if name else None
    if path is None or not path.is_file():
        return None
    with Image.open(path) as image:
        if max(image.size) <= SHOWN_PIXELS:
            return path.read_bytes()
        image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()


def _shown(size: int) -> int:
    """CSS pixels of an image's edge: a whole multiple of a small image, so that its pixels stay square."""
    return size * max(1, 64 // size) if size < SHOWN_PIXELS else SHOWN_PIXELS
