"""Labelled images in one array in memory: IDX files, CIFAR's files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_idx
from diffdfkd.engine.pixels import Decoder, Wanted, stack
from diffdfkd.engine.tar_images import UNLABELLED, check_label


class ArrayImages:
    """Pixels uint8 [n,C,h,w] with C of 1 or 3 and labels [n], as a file held them."""

    def __init__(
        self, path: Path, pixels: np.ndarray, labels: np.ndarray, wanted: Wanted, classes: list[str] | None = None
    ) -> None:
        """Of the file at `path`; `classes` are those that the labels count, the wanted ones by default."""
        self.classes = wanted.names() if classes is None else classes
        self._path, self._pixels, self._labels = path, pixels, labels
        stored = pixels.shape[1]
        self._decoder = Decoder(wanted)
        self._decoder.channels = wanted.channels or (1 if stored == 1 else 3)
        self._as_stored = self._decoder.keeps(*pixels.shape[2:]) and stored in (1, self._decoder.channels)

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def files(self) -> Iterable[Path]:
        """Files that the images are read from, in order."""
        return [self._path]

    def first_unlabelled(self) -> int | None:
        """Index of the first image without a label; None where all have one."""
        return 0 if len(self._labels) and self._labels[0] == UNLABELLED else None  # all have one, or none has

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 [n,C,H,W] and labels int64 [n] at these indices."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = torch.from_numpy(self._labels[chosen].astype(np.int64))
        if self._as_stored:
            pixels = torch.from_numpy(self._pixels[chosen])
            return pixels.repeat(1, (self._decoder.channels or 1) // pixels.shape[1], 1, 1), labels
        names = [f"{self._path}, image {index}" for index in chosen]
        planes = [self._pixels[index] for index in chosen]
        images = [Image.fromarray(p[0] if len(p) == 1 else np.ascontiguousarray(p.transpose(1, 2, 0))) for p in planes]
        return stack([self._decoder.array(*pair) for pair in zip(images, names, strict=True)], names), labels


def idx_images(path: Path, labels: str | Path | None, wanted: Wanted) -> ArrayImages:
    """Grey images of an IDX file, with the labels of the named file or of its companion."""
    pixels = read_idx(path, 3)[:, None]
    if labels is None and wanted.labelled:
        companion = path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
        labels = path.with_name(companion)
        if companion == path.name or not labels.is_file():
            raise UserError(f"{path}: no labels file beside it ({companion}); name it with evaluation.labels")
    if not wanted.labelled or labels is None:
        return ArrayImages(path, pixels, np.full(len(pixels), UNLABELLED), wanted)
    values = read_idx(labels, 1)
    if len(pixels) != len(values):
        raise UserError(f"{labels}: {len(values)} labels for the {len(pixels)} images of {path}")
    if len(values):
        check_label(int(values.max()), wanted.names(), str(labels))
    return ArrayImages(path, pixels, values, wanted)
