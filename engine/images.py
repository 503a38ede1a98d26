"""Labelled images from disk by index: IDX files, class folders, WebDataset tars (our own shards and strangers')."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_idx
from diffdfkd.engine.pixels import SUFFIXES, Channels, Decoder, stack
from diffdfkd.engine.tar_images import UNLABELLED, TarImages, check_label


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
    labelled: bool = True,
) -> "IdxImages | FolderImages | TarImages":
    """Images of an IDX file, a folder with one sub-folder a class, a flat folder, a tar, or a folder of tars.

    `channels` converts (grey is replicated, colour becomes luma); without it the first image decides. `classes`
    gives the order of named sub-folders, and the labels' range. `size` resizes images of another height or width,
    antialiased; without it all images must be of one size. Folders inside a class folder belong to it, as in
    torchvision's ImageFolder. Without `labelled` labels are neither read nor checked:
    all are UNLABELLED, and folders may have any names and depth. Raises UserError that names the file.
    """
    path = Path(path)
    wanted: dict[str, Any] = {
        "channels": channels,
        "classes": classes,
        "size": size,
        "interpolation": interpolation,
        "labelled": labelled,
    }
    if path.is_dir():
        if labels is not None:
            raise UserError(f"{labels}: a labels file belongs to an IDX file, but {path} is a folder; set it to null")
        names = source_files(path)
        if tars := [path / name for name in names if _is_tar(name)]:
            if len(tars) < len(names):
                raise _mixed(path, names)
            return TarImages(tars, **wanted)
        return FolderImages(path, names, **wanted)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", path.name.lower()):
        raise UserError(f"{path}: a packed archive, in which no image can be read alone; unpack it first")
    if _is_tar(path.name):
        return TarImages([path], **wanted)
    return IdxImages(path, labels, **wanted)


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


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _mixed(path: Path, names: list[str]) -> UserError:
    tars, files = [name for name in names if _is_tar(name)], [name for name in names if not _is_tar(name)]
    home = os.path.commonpath([os.path.dirname(name) for name in tars])
    apart = home and not any(name.startswith(f"{home}/") for name in files)
    cure = f"give {path / home} for the tars alone" if apart else "give a folder of the ones or of the others alone"
    return UserError(f"{path}: holds tars ({tars[0]}) and loose image files ({files[0]}); {cure}")


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
        labelled: bool = True,
    ) -> None:
        if labels is None and labelled:
            companion = path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
            labels = path.with_name(companion)
            if companion == path.name or not labels.is_file():
                raise UserError(f"{path}: no labels file beside it ({companion}); name it with evaluation.labels")
        self.classes = None if classes is None else list(classes)
        self._decoder = Decoder(channels or 1, size, interpolation)
        self._pixels = read_idx(path, 3)
        self._labels = np.full(len(self._pixels), UNLABELLED)
        if labelled and labels is not None:
            self._labels = read_idx(labels, 1)
            if len(self._pixels) != len(self._labels):
                raise UserError(f"{labels}: {len(self._labels)} labels for the {len(self._pixels)} images of {path}")
            if len(self._labels):
                check_label(int(self._labels.max()), self.classes, str(labels))
        self._path = path

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
        names: list[str],
        *,
        channels: Channels | None = None,
        classes: Sequence[str] | None = None,
        size: int | None = None,
        interpolation: str = "bilinear",
        labelled: bool = True,
    ) -> None:
        """Of the image files that `source_files` found in the folder."""
        self.classes = None if classes is None else list(classes)
        self._path = path
        # Text, since a million paths would take a gigabyte.
        self._names = names
        self._labels = np.full(len(names), UNLABELLED)
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if labelled and folders:
            self._label(folders)
        if not self._names:
            raise UserError(f"{path}: holds no class folders, no tars and no images ({', '.join(SUFFIXES)})")
        self._decoder = Decoder(channels, size, interpolation)
        self._decoder.settle(self._bytes(0), str(path / self._names[0]))

    def _label(self, folders: list[str]) -> None:
        """Label all images by the folder they are in, and sort them by label."""
        if loose := [name for name in self._names if "/" not in name]:
            raise UserError(
                f"{self._path}: holds class folders ({folders[0]}) and loose images ({loose[0]}), which have no label; "
                "move the loose ones into their class folders, or out of it"
            )
        order, self.classes = _class_order(folders, self.classes, self._path)
        labels = dict(zip(folders, order, strict=True))
        owners = [name.partition("/")[0] for name in self._names]
        if empty := sorted(set(folders).difference(owners)):
            raise UserError(f"{self._path / empty[0]}: a class folder without images; {', '.join(SUFFIXES)} are read")
        self._labels = np.asarray([labels[owner] for owner in owners], dtype=np.int64)
        places = np.argsort(self._labels, kind="stable")
        self._names = [self._names[place] for place in places]
        self._labels = self._labels[places]

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
        names = [str(self._path / self._names[index]) for index in indices]
        arrays = [self._decoder.decode(self._bytes(index), name) for index, name in zip(indices, names, strict=True)]
        return stack(arrays, names), torch.from_numpy(self._labels[np.asarray(indices, dtype=np.int64)])

    def _bytes(self, index: int) -> bytes:
        file = self._path / self._names[index]
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); put it back, or take it away") from None


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
