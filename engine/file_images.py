"""Labelled image files: one sub-folder a class, or a list of files with their labels."""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.class_names import class_order
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.pixels import SUFFIXES, Decoder, Wanted, stack
from diffdfkd.engine.tar_images import UNLABELLED


class FileImages:
    """Image files by their names below a folder, and their labels [n], UNLABELLED where there are none."""

    def __init__(
        self, path: Path, names: list[str], labels: np.ndarray, wanted: Wanted, classes: list[str] | None = None
    ) -> None:
        """`classes` are those that the labels count, the wanted ones by default."""
        self.classes = wanted.names() if classes is None else classes
        self._path = path
        # Text, since a million paths would take a gigabyte.
        self._names, self._labels = names, labels
        self._decoder = Decoder(wanted)
        self._decoder.settle(self._bytes(0), str(path / names[0]))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def files(self) -> Iterable[Path]:
        """Files that the images are read from, in order; made one by one."""
        return (self._path / name for name in self._names)

    def first_unlabelled(self) -> int | None:
        """Index of the first image without a label; None where all have one."""
        return 0 if self._labels[0] == UNLABELLED else None  # all have one, or none has

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 [n,C,H,W] and labels int64 [n] at these indices."""
        names = [str(self._path / self._names[index]) for index in indices]
        arrays = [self._decoder.decode(self._bytes(index), name) for index, name in zip(indices, names, strict=True)]
        return stack(arrays, names), torch.from_numpy(self._labels[np.asarray(indices, dtype=np.int64)])

    def _bytes(self, index: int) -> bytes:
        file = self._path / self._names[index]
        try:
            # A pipe would otherwise be waited for at once.
            with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise UserError(f"{file}: no plain file, and reading it could wait for ever; take it away")
                return stream.read()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); put it back, or take it away") from None


def folder_images(path: Path, names: list[str], wanted: Wanted) -> FileImages:
    """Of the image files that `source_files` found: sub-folders named like the classes or numbered from 0, or none.

    A flat folder is unlabelled. Names are compared by their letters and digits alone.
    """
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if wanted.labelled and folders:
        return _labelled(path, names, folders, wanted)
    if not names:
        raise UserError(f"{path}: holds no class folders, no tars and no images ({', '.join(SUFFIXES)})")
    return FileImages(path, names, np.full(len(names), UNLABELLED), wanted)


def _labelled(path: Path, names: list[str], folders: list[str], wanted: Wanted) -> FileImages:
    """All images labelled by the folder they are in, and sorted by label."""
    if loose := [name for name in names if "/" not in name]:
        raise UserError(
            f"{path}: holds class folders ({folders[0]}) and loose images ({loose[0]}), which have no label; "
            "move the loose ones into their class folders, or out of it"
        )
    order, classes = class_order(folders, wanted.names(), path)
    label_of = dict(zip(folders, order, strict=True))
    owners = [name.partition("/")[0] for name in names]
    if empty := sorted(set(folders).difference(owners)):
        raise UserError(f"{path / empty[0]}: a class folder without images; {', '.join(SUFFIXES)} are read")
    labels = np.asarray([label_of[owner] for owner in owners], dtype=np.int64)
    places = np.argsort(labels, kind="stable")
    return FileImages(path, [names[place] for place in places], labels[places], wanted, classes)


def source_files(path: Path) -> list[str]:
    """Names of the tars and image files at any depth of a folder, relative to it and sorted; hidden ones left out.

    Links to folders are followed, but no folder is entered twice. Raises UserError for one that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); let it be read, or take it away")

    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(path, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        prefix = "" if folder == str(path) else f"{os.path.relpath(folder, path)}/"
        names += [
            prefix + name
            for name in files
            if name[0] != "." and os.path.splitext(name)[1].lower() in (".tar", *SUFFIXES)
        ]
    return sorted(names)
