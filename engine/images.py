"""Labelled images from disk by index, whatever they lie in: one function that looks at the path."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from diffdfkd.engine.array_images import idx_images
from diffdfkd.engine.data_sets import open_data_set
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.file_images import folder_images, source_files
from diffdfkd.engine.listed_images import listed_images
from diffdfkd.engine.pixels import Channels, Wanted
from diffdfkd.engine.tar_images import TarImages


class Images(Protocol):
    """Random access to images, with memory that does not grow with the pixels read."""

    classes: list[str] | None
    """Class names in the order of the labels, where the source or the caller gives them."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 [n,C,H,W] and labels int64 [n] at these indices."""
        ...


class SourceImages(Images, Protocol):
    """Images that lie in files."""

    @property
    def files(self) -> Iterable[Path]:
        """Files that the images are read from, in order."""
        ...

    def first_unlabelled(self) -> int | None:
        """Index of the first image without a label; None where all have one."""
        ...


def open_images(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    channels: Channels | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    interpolation: str = "bilinear",
    crop_fraction: float | None = None,
    labelled: bool = True,
) -> SourceImages:
    """Images of an IDX file, a folder with one sub-folder a class, a flat folder, a tar, a folder of tars, or a data
    set as it is unpacked (`open_data_set`), of which only the test split is read.

    `channels` to `labelled` are those of `Wanted`. `labels` names the labels of an IDX file, or for a folder a list
    of lines ``file label``. Folders inside a class folder belong to it, as in torchvision's ImageFolder. Without
    `labelled` all are UNLABELLED, and folders may have any names and depth. Raises UserError that names the file.
    """
    path = Path(path)
    wanted = Wanted(channels, size, interpolation, crop_fraction, classes, labelled)
    if path.is_dir():
        if labels is not None:
            return listed_images(path, Path(labels), wanted)
        if labelled and (found := open_data_set(path, wanted)) is not None:
            return found
        names = source_files(path)
        if tars := [path / name for name in names if _is_tar(name)]:
            if len(tars) < len(names):
                raise _mixed(path, names)
            return TarImages(tars, wanted)
        return folder_images(path, names, wanted)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", path.name.lower()):
        raise UserError(f"{path}: a packed archive, in which no image can be read alone; unpack it first")
    if _is_tar(path.name):
        return TarImages([path], wanted)
    return idx_images(path, labels, wanted)


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _mixed(path: Path, names: list[str]) -> UserError:
    tars, files = [name for name in names if _is_tar(name)], [name for name in names if not _is_tar(name)]
    home = os.path.commonpath([os.path.dirname(name) for name in tars])
    apart = home and not any(name.startswith(f"{home}/") for name in files)
    cure = f"give {path / home} for the tars alone" if apart else "give a folder of the ones or of the others alone"
    return UserError(f"{path}: holds tars ({tars[0]}) and loose image files ({files[0]}); {cure}")
