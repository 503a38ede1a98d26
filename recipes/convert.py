"""Shards to a plain folder of images, one sub-folder a class.

diffdfkd convert runs/fashion my-images/ --format webp --size 64
"""

import csv
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, cast

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.preview import run_of

SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
LABELS = "labels.csv"
MOST_PIXELS = 8192
"""Of a side: 200 MB an image in memory, and twice that while it is resized."""

Label = int | str


@dataclass(frozen=True)
class Entry:
    """A sample of a tar, its image still encoded."""

    where: str
    """Tar and number, for errors."""
    key: str
    image: bytes
    label: Label
    """The class as the tar gives it: by number or by name."""
    name: str | None
    """The class's name beside its number, where the record has one."""
    soft_label: Mapping[str, float] | None


def convert(source: Path, folder: Path, *, format: str = "png", size: int | None = None) -> str:
    """Write the images of a run, of a folder of shards or of a tar into a new folder, one sub-folder a class.

    Images that have the format and the size already are copied byte by byte. ``labels.csv`` lists all with class and
    soft label, ``image-licences.json`` says what is stated of them. Everything is checked before the folder appears;
    returns what was done in a sentence. Raises UserError for a shard that is damaged, an image without a class, and a
    folder that holds something.
    """
    from diffdfkd.engine.licences import IMAGES_FILE, image_licences

    if format not in SUFFIXES:
        raise UserError(f"--format: got {format}; allowed: {', '.join(SUFFIXES)}")
    if size is not None and not 1 <= size <= MOST_PIXELS:
        raise UserError(f"--size: got {size}; allowed: pixels, 1 to {MOST_PIXELS}")
    if (run := run_of(folder)) is not None:
        raise UserError(f"{folder}: lies in the folder of a run ({run}), where only the run writes; choose another")
    tars = _tars(source)
    licences = image_licences(source / "synthetic" if (source / "synthetic").is_dir() else source)
    classes = _classes(tars)
    folders = folder_names(classes)
    images = soft = 0
    with _new_folder(folder) as new:
        for name in folders.values():
            (new / name).mkdir()
        (new / IMAGES_FILE).write_text(json.dumps(licences, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with open(new / LABELS, "x", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["file", "key", "class", "class_name", "soft_label"])
            for number, entry in _entries(tars, images=True):
                content = _encoded(entry, cast(Literal["png", "webp", "jpeg"], format), size)
                file = _place(new / folders[entry.label], entry.key, number, SUFFIXES[format])
                file.write_bytes(content)
                label = json.dumps(entry.soft_label, sort_keys=True) if entry.soft_label else ""
                place = file.relative_to(new).as_posix()
                table.writerow([place, entry.key, entry.label, classes[entry.label], label])
                images += 1
                soft += entry.soft_label is not None
    note = f"; {soft} soft labels stand in {LABELS} alone, which folders cannot express" if soft else ""
    kinds = f"{len(folders)} folder{'s' if len(folders) > 1 else ''}"
    return f"wrote {images} image{'s' if images > 1 else ''} in {kinds}, {LABELS} and {IMAGES_FILE} to {folder}{note}"


def folder_names(classes: Mapping[Label, str]) -> dict[Label, str]:
    """A folder's name for each class, from which `folder_images` finds back to it.

    The class's own name where that is safe in any file system; where two classes would share one, or one be left with
    none, all are numbered: ``03-name``.
    """
    from diffdfkd.engine.class_names import plain

    names = {label: _safe(name) for label, name in classes.items()}
    distinct = {plain(name) for name in names.values()}
    if len(distinct) == len(names) and "" not in distinct:
        return names
    numbers = [label for label in names if isinstance(label, int)]
    if len(numbers) < len(names):
        numbers = list(range(len(names)))
    digits = len(str(max(numbers)))
    return {label: f"{number:0{digits}}-{names[label]}" for label, number in zip(names, numbers, strict=True)}


def _safe(name: str) -> str:
    """Letters, digits and a few signs, with no dot or space at either end."""
    return re.sub(r"[^\w.+ -]", "_", name).strip(". ")


def _tars(source: Path) -> list[Path]:
    """The tars of a run, of a folder or of one file, those with a sidecar found to be whole."""
    from diffdfkd.engine.file_images import source_files
    from diffdfkd.engine.shards import SIDECAR, DamagedShard, verify_content

    run = source / "synthetic"
    if source.is_file():
        tars = [source]
    elif run.is_dir():
        # A shard exists when its sidecar does.
        sidecars = sorted(path for path in run.glob("round-*/shard-*.json") if SIDECAR.fullmatch(path.name))
        tars = [path.with_suffix(".tar") for path in sidecars]
    elif source.is_dir():
        tars = [source / name for name in source_files(source) if name.lower().endswith(".tar")]
    else:
        raise UserError(f"{source}: no such file or folder; give a run, a folder of shards, or a .tar")
    if not tars:
        raise UserError(f"{source}: holds no shards; give a run, a folder of shards, or a .tar")
    for tar in tars:
        sidecar = tar.with_suffix(".json")
        if not (sidecar.is_file() and SIDECAR.fullmatch(sidecar.name)):
            continue
        try:
            verify_content(tar)
        except DamagedShard as reason:
            raise UserError(
                f"{tar}: damaged ({reason}); `diffdfkd synthesize` with the run's recipe makes it again, or take it "
                "away with its .json"
            ) from None
    return tars


def _classes(tars: list[Path]) -> dict[Label, str]:
    """Name of each class that occurs, numbers first and in order."""
    given: dict[Label, str | None] = {}
    for _, entry in _entries(tars):
        name = given.setdefault(entry.label, entry.name)
        if entry.name not in (name, None) and name is not None:
            raise UserError(
                f"{entry.where}: class {entry.label} is {entry.name} here and {name} elsewhere; convert them into two "
                "folders"
            )
        given[entry.label] = name or entry.name
    numbers = sorted(label for label in given if isinstance(label, int))
    order: list[Label] = [*numbers, *sorted(label for label in given if isinstance(label, str))]
    return {label: given[label] or str(label) for label in order}


def _entries(tars: list[Path], images: bool = False) -> Iterator[tuple[int, Entry]]:
    """(number of the tar, sample) in the order of the tars and of their samples; image bytes only if asked for."""
    from diffdfkd.engine.tar_images import scan_tar

    for number, tar in enumerate(tars):
        samples = scan_tar(tar, labelled=True)
        with open(tar, "rb") as stream:
            for place, sample in enumerate(samples):
                offset, length, label_offset, label_length, is_json = sample.row
                where = f"{tar}, sample {place}"
                image = os.pread(stream.fileno(), length, offset) if images else b""
                record = _record(os.pread(stream.fileno(), label_length, label_offset), is_json, where)
                label, name = record.get("class"), record.get("class_name")
                if isinstance(label, bool) or not isinstance(label, int | str) or label in (-1, ""):
                    raise UserError(f"{where}: has no class, so that there is no folder for it; give labelled shards")
                if isinstance(label, int) and label < 0:
                    raise UserError(f"{where}: class {label}; allowed: 0 or above")
                soft = record.get("soft_label")
                yield (
                    number,
                    Entry(where, sample.key, image, label, name if isinstance(name, str) else None, soft or None),
                )


def _record(content: bytes, is_json: bool, where: str) -> dict[str, Any]:
    if not content:
        return {}
    try:
        record = json.loads(content) if is_json else {"class": int(content)}
    except ValueError as error:
        raise UserError(f"{where}: unreadable label ({error}); .json with a class, or .cls") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: unreadable label (no object); .json with a class, or .cls")
    return record


def _encoded(entry: Entry, format: Literal["png", "webp", "jpeg"], size: int | None) -> bytes:
    """The image as it was stored where format and size are those wanted, or encoded anew."""
    from PIL import Image

    from diffdfkd.engine.pixels import Decoder, Wanted, encode_image, open_image

    image = open_image(entry.image, entry.where)
    if image.format == format.upper() and (size is None or image.size == (size, size)):
        return entry.image
    decoder = Decoder(Wanted(1 if image.mode in ("1", "L", "LA") else 3, size))
    pixels = decoder.array(image, entry.where)
    return encode_image(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)), format)


def _place(folder: Path, key: str, tar: int, suffix: str) -> Path:
    """A free name in the folder, made from the last part of the sample's key."""
    stem = _safe(key.rpartition("/")[2]) or "image"
    again = (f"{tar:05d}-{stem}-{number}" for number in count(2))
    places = (folder / f"{name}{suffix}" for name in chain([stem, f"{tar:05d}-{stem}"], again))
    return next(place for place in places if not place.exists())


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name beside `folder`, which takes its place once the block is through."""
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not an empty folder; give a new one")
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
