"""WebDataset tars by index, our own shards and strangers', and what a label may be."""

import json
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.pixels import SUFFIXES, Decoder, Wanted, stack

log = logging.getLogger(__name__)

UNLABELLED = -1
"""Label of an image whose source gives none; good for distillation, refused by evaluation."""
OPEN_FILES = 16


class TarImages:
    """WebDataset tars: an image and a ``.json`` with "class" (number or name), or a ``.cls``, of the same key.

    The index of offsets is made once by scanning the headers; images are decoded when they are read. A sample
    without a label is UNLABELLED; without `labelled` all are, and the ending of a name is what follows its last dot.
    """

    def __init__(self, tars: Sequence[Path], wanted: Wanted) -> None:
        self.classes = wanted.names()
        self._tars = list(tars)
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        # A row a sample: tar, offset and length of the image, offset and length of the label (0 without), is it JSON.
        # Packed tar by tar: as Python's numbers a million samples would take 300 MB.
        rows = [
            np.asarray([(number, *sample.row) for sample in scan_tar(tar, wanted.labelled)], np.int64).reshape(-1, 6)
            for number, tar in enumerate(tars)
        ]
        self._rows = np.concatenate(rows)
        if not len(self._rows):
            raise UserError(f"{tars[0]}: {len(tars)} tar file(s) without an image ({', '.join(SUFFIXES)})")
        self._decoder = Decoder(wanted)
        self._decoder.settle(self._bytes(*self._rows[0, :3]), self._name(0))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def files(self) -> Iterable[Path]:
        """Files that the images are read from, in order."""
        return self._tars

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
        return given if given == UNLABELLED else check_label(given, self.classes, name)


def check_label(label: int, classes: list[str] | None, name: str) -> int:
    """The label; UserError that begins with ``name`` if it is none of the classes."""
    if label < 0 or (classes is not None and label >= len(classes)):
        allowed = f"0 to {len(classes) - 1}" if classes is not None else "0 or above"
        raise UserError(f"{name}: label {label} is outside the classes; allowed: {allowed}")
    return label


@dataclass(frozen=True, slots=True)
class TarSample:
    """Where a sample lies in its tar."""

    key: str
    """Name of its members up to the first dot, folders included, as the tar has it: never to be trusted as a path."""
    row: tuple[int, int, int, int, bool]
    """Offset and length of the image, offset and length of the label (0 without), whether that is JSON."""


def scan_tar(path: Path, labelled: bool) -> list[TarSample]:
    """The samples of a WebDataset tar in its order; UserError unless it is whole and uncompressed."""
    images: dict[str, tuple[int, int]] = {}
    members = 0
    labels: dict[str, tuple[int, int, bool]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key, place = os.path.join(folder, stem), (member.offset_data, member.size)
                if not member.isreg() or not stem:
                    continue
                kind = extension if labelled else extension.rpartition(".")[2]
                if f".{kind.lower()}" in SUFFIXES:
                    images.setdefault(key, place)
                    members += 1
                elif labelled and extension in ("json", "cls") and (extension == "cls" or key not in labels):
                    labels[key] = (*place, extension == "json")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a whole, uncompressed tar file: {error}") from None
    if members > len(images):
        log.warning(
            "%s: %d of its %d images are left out: their names agree with another's up to the first dot, so that they "
            "are one sample of a WebDataset, of which the first image is taken",
            path,
            members - len(images),
            members,
        )
    return [TarSample(key, (*place, *labels.get(key, (0, 0, False)))) for key, place in images.items()]
