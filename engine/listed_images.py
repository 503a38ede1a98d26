"""Image files whose labels stand in a list: DomainNet's ``clipart_test.txt``, Tiny ImageNet's validation images."""

from pathlib import Path, PurePosixPath

import numpy as np

from diffdfkd.engine.class_names import match_classes, read_words
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.file_images import FileImages
from diffdfkd.engine.pixels import Wanted
from diffdfkd.engine.tar_images import check_label


def listed_images(path: Path, listing: Path, wanted: Wanted) -> FileImages:
    """The images of a list of lines ``file label``, in its order: its test list alone decides what is read.

    Files are relative to `path` or, as in DomainNet, begin with its name. Labels are names of classes, or numbers.
    Where each number has a folder of its own, the folders' names decide, as the list may number the classes otherwise
    than the teacher; else the numbers are the teacher's. Raises UserError that names the list and the line.
    """
    rows = [(number, line.rsplit(maxsplit=1)) for number, line in enumerate(_lines(listing), 1) if line.strip()]
    if bad := next((number for number, row in rows if len(row) != 2), None):
        raise UserError(f"{listing}: line {bad} is not `file label`")
    if not rows:
        raise UserError(f"{listing}: names no images")
    files = [PurePosixPath(row[0]) for _, row in rows]
    labels = [row[1] for _, row in rows]
    for (number, _), file in zip(rows, files, strict=True):
        if file.is_absolute() or ".." in file.parts:
            raise UserError(f"{listing}: line {number} leads out of {path}; give files below it")
    root = path
    if not (path / files[0]).is_file() and files[0].parts[0] == path.absolute().name:
        root = path.absolute().parent
    if missing := next((file for file in files if not (root / file).is_file()), None):
        raise UserError(f"{listing}: {missing} is not below {root}; give the folder that the list's files lie in")
    values, classes = _labels(labels, [file.parent.name for file in files], listing, wanted)
    return FileImages(root, [str(file) for file in files], values, wanted, classes)


def tiny_imagenet(folder: Path, wanted: Wanted) -> FileImages:
    """The 10,000 validation images, which stand for the test split, whose labels were never published.

    `folder` is ``tiny-imagenet-200``. Classes are known by their wnid, or by one of the names in ``words.txt``.
    """
    validation = folder / "val"
    wnids = [line.strip() for line in _lines(folder / "wnids.txt") if line.strip()]
    words = read_words(folder / "words.txt") if (folder / "words.txt").is_file() else {}
    order = match_classes([[wnid, *words.get(wnid, [])] for wnid in wnids], wanted.classes, folder)
    label_of = dict(zip(wnids, order, strict=True))
    annotations = validation / "val_annotations.txt"
    names, labels = [], []
    for number, line in enumerate(_lines(annotations), 1):
        name, wnid = [*line.split("\t"), "", ""][:2]
        if not name or "/" in name or wnid not in label_of:
            raise UserError(f"{annotations}: line {number} is not a file and a known wnid; unpack the data set again")
        names.append(f"images/{name}")
        labels.append(label_of[wnid])
    if not names:
        raise UserError(f"{annotations}: names no images; unpack the data set again")
    return FileImages(validation, names, np.asarray(labels, np.int64), wanted, wanted.names() or wnids)


def _labels(
    labels: list[str], folders: list[str], listing: Path, wanted: Wanted
) -> tuple[np.ndarray, list[str] | None]:
    """Wanted label of each image and the class names, where there are any."""
    numbered = all(label.isascii() and label.isdigit() for label in labels)
    pairs = set(zip(labels, folders, strict=True))
    one_to_one = len(pairs) == len(set(labels)) == len(set(folders)) > 1
    if numbered and not one_to_one:
        values = [check_label(int(label), wanted.names(), str(listing)) for label in labels]
        return np.asarray(values, np.int64), wanted.names()
    names = [folder for _, folder in sorted(pairs, key=lambda pair: int(pair[0]))] if numbered else sorted(set(labels))
    order = match_classes([[name] for name in names], wanted.classes, listing, whole=False)
    label_of = dict(zip(names, order, strict=True))
    chosen = folders if numbered else labels
    return np.asarray([label_of[name] for name in chosen], np.int64), wanted.names() or names


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        cure = "for a folder of images it is a list of lines `file label`, or null where sub-folders are the classes"
        raise UserError(f"{file}: no such file; {cure}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); let it be read, or give another") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file; give the list of images and their labels") from None
