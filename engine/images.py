"""Labelled images from disk by index: IDX files, class folders, WebDataset tars (our own shards and strangers')."""

import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_idx
from diffdfkd.engine.pixels import SUFFIXES, Channels, Decoder, stack

UNLABELLED = -1
"""Label of an image whose source gives none; good for distillation, refused by evaluation."""
OPEN_FILES = 16


class Images(Protocol):
    """Random access to images, with memory that does not grow with the pixels read."""

    classes: list[str] | None
    """Class names in the order of the labels, where the source or the caller gives them."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 [n,C,H,W] and labels int64 [n] at these indices."""
        ...


def open_images(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    channels: Channels | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    interpolation: str = "bilinear",
) -> "IdxImages | FolderImages | TarImages":
    """Images of an IDX file, a folder with one sub-folder a class, a flat folder, a tar, or a folder of tars.

    `channels` converts (grey is replicated, colour becomes luma); without it the first image decides. `classes`
    gives the order of named sub-folders, and the labels' range. `size` resizes images of another height or width,
    antialiased; without it all images must be of one size. Raises UserError that names the file.
    """
    path = Path(path)
    if path.is_dir():
        if labels is not None:
            raise UserError(f"{labels}: a labels file belongs to an IDX file, but {path} is a folder; set it to null")
        if tars := sorted(path.rglob("*.tar")):
            return TarImages(tars, channels=channels, classes=classes, size=size, interpolation=interpolation)
        return FolderImages(path, channels=channels, classes=classes, size=size, interpolation=interpolation)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", path.name.lower()):
        raise UserError(f"{path}: a packed archive, in which no image can be read alone; unpack it first")
    if path.suffix == ".tar":
        return TarImages([path], channels=channels, classes=classes, size=size, interpolation=interpolation)
    return IdxImages(path, labels, channels=channels, classes=classes, size=size, interpolation=interpolation)


class IdxImages:
    """Grey images of an IDX file and the labels of its companion; the unpacked bytes are held in memory."""

    def __init__(
        self,
        path: Path,
        labels: str | Path | None = None,
        *,
        channels: Channels | None = None,
        classes: Sequence[str] | None = None,
        size: int | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        if labels is None:
            companion = path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
            labels = path.with_name(companion)
            if companion == path.name or not labels.is_file():
                raise UserError(f"{path}: no labels file beside it ({companion}); name it with evaluation.labels")
        self.classes = None if classes is None else list(classes)
        self._decoder = Decoder(channels or 1, size, interpolation)
        self._pixels = read_idx(path, 3)
        self._labels = read_idx(labels, 1)
        if len(self._pixels) != len(self._labels):
            raise UserError(f"{labels}: {len(self._labels)} labels for the {len(self._pixels)} images of {path}")
        if len(self._labels):
            _check_label(int(self._labels.max()), self.classes, str(labels))
        self._path = path

    def __len__(self) -> int:
        return len(self._pixels)

    def first_unlabelled(self) -> int | None:
        """Index of the first image without a label: there is none."""
        return None

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(indices, dtype=np.int64)
        labels = torch.from_numpy(self._labels[chosen].astype(np.int64))
        size = self._decoder.size
        if size is None or self._pixels.shape[1:] == (size, size):
            pixels = torch.from_numpy(self._pixels[chosen]).unsqueeze(1)
            return pixels.repeat(1, self._decoder.channels or 1, 1, 1), labels
        names = [f"{self._path}, image {index}" for index in chosen]
        images = [Image.fromarray(self._pixels[index]) for index in chosen]
        arrays = [self._decoder.array(image, name) for image, name in zip(images, names, strict=True)]
        return stack(arrays, names), labels


class FolderImages:
    """Image files in one sub-folder a class, named like the classes or numbered from 0; or a flat folder, unlabelled.

    Names are compared by their letters and digits alone, so that the folder ``t-shirt_top`` is class ``T-shirt/top``.
    """

    def __init__(
        self,
        path: Path,
        *,
        channels: Channels | None = None,
        classes: Sequence[str] | None = None,
        size: int | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        labels: list[int] = []
        self._files: list[Path] = []
        self.classes = None if classes is None else list(classes)
        if folders:
            order, self.classes = _class_order([folder.name for folder in folders], self.classes, path)
            for folder, label in sorted(zip(folders, order, strict=True), key=lambda pair: pair[1]):
                files = _image_files(folder)
                if not files:
                    raise UserError(f"{folder}: a class folder without images; {', '.join(SUFFIXES)} are read")
                self._files += files
                labels += [label] * len(files)
        else:
            self._files = _image_files(path)
            labels = [UNLABELLED] * len(self._files)
            if not self._files:
                raise UserError(f"{path}: holds no class folders, no tars and no images ({', '.join(SUFFIXES)})")
        self._labels = np.asarray(labels, dtype=np.int64)
        self._decoder = Decoder(channels, size, interpolation)
        self._decoder.settle(self._files[0].read_bytes(), str(self._files[0]))

    def __len__(self) -> int:
        return len(self._files)

    def first_unlabelled(self) -> int | None:
        """Index of the first image without a label; None where all have one."""
        return 0 if self._labels[0] == UNLABELLED else None  # a folder is flat or it is not

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        files = [self._files[index] for index in indices]
        names = [str(file) for file in files]
        arrays = [self._decoder.decode(file.read_bytes(), name) for file, name in zip(files, names, strict=True)]
        return stack(arrays, names), torch.from_numpy(self._labels[np.asarray(indices, dtype=np.int64)])


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "-", name.casefold()).strip("-")


def _class_order(folders: list[str], classes: list[str] | None, path: Path) -> tuple[list[int], list[str] | None]:
    """(label of each folder, class names); raises UserError unless folders and classes are one to one."""
    numbers = [int(name) if name.isascii() and name.isdigit() else -1 for name in folders]
    numbered = sorted(numbers) == list(range(len(folders)))
    if classes is None:
        return (numbers, None) if numbered else (list(range(len(folders))), folders)
    for key in (str, _plain):
        known = {key(name): label for label, name in enumerate(classes)}
        found = [key(name) for name in folders]
        if len(known) == len(classes) == len(found) and set(found) == set(known):
            return [known[name] for name in found], classes
    if numbered and len(folders) == len(classes):
        return numbers, classes
    if 2 * sum(number >= 0 for number in numbers) > len(folders) and not any(name.isdigit() for name in classes):
        raise _misnumbered(folders, numbers, len(classes), path)
    plain = {_plain(name) for name in classes}
    strangers = [name for name in folders if _plain(name) not in plain]
    absent = [name for name in classes if _plain(name) not in {_plain(folder) for folder in folders}]
    raise UserError(
        f"{path}: its {len(folders)} folders do not match the {len(classes)} classes; "
        + (f"no class is named {', '.join(strangers[:3])}; " if strangers else "")
        + (f"no folder for {', '.join(absent[:3])}; " if absent else "")
        + f"name them like teacher.classes, or 0 to {len(classes) - 1}"
    )


def _misnumbered(folders: list[str], numbers: list[int], count: int, path: Path) -> UserError:
    """What keeps folders that are numbered, most of them, from being 0 to ``count`` - 1."""
    absent = [str(number) for number in range(count) if number not in numbers]
    odd = [
        name
        for place, (name, number) in enumerate(zip(folders, numbers, strict=True))
        if not 0 <= number < count or number in numbers[:place]
    ]
    problems = [f"no folder {', '.join(absent[:3])}"] if absent else []
    problems += [f"{name} is not one of 0..{count - 1}" for name in odd[:3]]
    return UserError(
        f"{path}: {'; '.join(problems)}; number the {count} folders from 0, or name them like teacher.classes"
    )


class TarImages:
    """WebDataset tars: an image and a ``.json`` with "class" (number or name), or a ``.cls``, of the same key.

    The index of offsets is made once by scanning the headers; images are decoded when they are read. A sample
    without a label is UNLABELLED.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        channels: Channels | None = None,
        classes: Sequence[str] | None = None,
        size: int | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        self.classes = None if classes is None else list(classes)
        self._tars = list(tars)
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        # A row a sample: tar, offset and length of the image, offset and length of the label (0 without), is it JSON.
        # Packed tar by tar: as Python's numbers a million samples would take 300 MB.
        rows = [np.asarray([(number, *sample) for sample in _scan(tar)], np.int64) for number, tar in enumerate(tars)]
        self._rows = np.concatenate([part.reshape(-1, 6) for part in rows])
        if not len(self._rows):
            raise UserError(f"{tars[0]}: {len(tars)} tar file(s) without an image ({', '.join(SUFFIXES)})")
        self._decoder = Decoder(channels, size, interpolation)
        self._decoder.settle(self._bytes(*self._rows[0, :3]), self._name(0))

    def __len__(self) -> int:
        return len(self._rows)

    def first_unlabelled(self) -> int | None:
        """Index of the first image without a label; None where all have one. All labels are read and checked."""
        indices = range(len(self))
        return next((index for index in indices if self._label(index, self._name(index)) == UNLABELLED), None)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        names = [self._name(index) for index in indices]
        contents = [self._bytes(*self._rows[index, :3]) for index in indices]
        arrays = [self._decoder.decode(content, name) for content, name in zip(contents, names, strict=True)]
        labels = [self._label(index, name) for index, name in zip(indices, names, strict=True)]
        return stack(arrays, names), torch.tensor(labels, dtype=torch.int64)

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _bytes(self, number: int, offset: int, length: int) -> bytes:
        file = self._files.pop(number, None) or self._tars[number].open("rb")
        self._files[number] = file
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        # pread leaves no position behind, so that forked readers may share the file.
        return os.pread(file.fileno(), int(length), int(offset))

    def _name(self, index: int) -> str:
        number = self._rows[index, 0]
        return f"{self._tars[number]}, sample {index - int(np.searchsorted(self._rows[:, 0], number))}"

    def _label(self, index: int, name: str) -> int:
        number, _, _, offset, length, is_json = (int(value) for value in self._rows[index])
        if length == 0:
            return UNLABELLED
        content = self._bytes(number, offset, length)
        try:
            given = json.loads(content).get("class", UNLABELLED) if is_json else int(content)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{name}: unreadable label ({error}); .json with a class, or .cls") from None
        if isinstance(given, str) and self.classes is not None and given in self.classes:
            return self.classes.index(given)
        if isinstance(given, bool) or not isinstance(given, int):
            raise UserError(f"{name}: class {given!r} is neither a number nor one of the classes")
        return given if given == UNLABELLED else _check_label(given, self.classes, name)


def _scan(path: Path) -> list[tuple[int, int, int, int, bool]]:
    """(image offset, length, label offset, length, label is JSON) of each sample, in the order of the tar."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, int, bool]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key, place = os.path.join(folder, stem), (member.offset_data, member.size)
                if not member.isreg() or not stem:
                    continue
                if f".{extension.lower()}" in SUFFIXES:
                    images.setdefault(key, place)
                elif extension in ("json", "cls") and (extension == "cls" or key not in labels):
                    labels[key] = (*place, extension == "json")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a whole, uncompressed tar file: {error}") from None
    return [(*place, *labels.get(key, (0, 0, False))) for key, place in images.items()]


def _check_label(label: int, classes: list[str] | None, name: str) -> int:
    if label < 0 or (classes is not None and label >= len(classes)):
        allowed = f"0 to {len(classes) - 1}" if classes is not None else "0 or above"
        raise UserError(f"{name}: label {label} is outside the classes; allowed: {allowed}")
    return label
