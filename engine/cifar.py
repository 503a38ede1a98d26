"""CIFAR-10 and CIFAR-100 as they are unpacked, pickled or binary: the test images alone.

Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html, which describes the layouts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from diffdfkd.engine.array_images import ArrayImages
from diffdfkd.engine.class_names import match_classes
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.pixels import Wanted
from diffdfkd.engine.plain_pickle import read_plain_pickle, texts

SIDE = 32
PIXELS = 3 * SIDE * SIDE


def pickled_cifar10(folder: Path, wanted: Wanted) -> ArrayImages:
    """``test_batch`` of ``cifar-10-batches-py``, its classes by the names in ``batches.meta``."""
    return _pickled(folder / "test_batch", "labels", folder / "batches.meta", "label_names", wanted)


def pickled_cifar100(folder: Path, wanted: Wanted) -> ArrayImages:
    """``test`` of ``cifar-100-python`` with its fine labels, their names from ``meta``."""
    return _pickled(folder / "test", "fine_labels", folder / "meta", "fine_label_names", wanted)


def binary_cifar10(folder: Path, wanted: Wanted) -> ArrayImages:
    """``test_batch.bin`` of ``cifar-10-batches-bin``, its classes by the names in ``batches.meta.txt``."""
    return _binary(folder / "test_batch.bin", 1, folder / "batches.meta.txt", wanted)


def binary_cifar100(folder: Path, wanted: Wanted) -> ArrayImages:
    """``test.bin`` of ``cifar-100-binary`` with its fine labels, their names from ``fine_label_names.txt``."""
    return _binary(folder / "test.bin", 2, folder / "fine_label_names.txt", wanted)


def _pickled(file: Path, key: str, meta: Path, names_key: str, wanted: Wanted) -> ArrayImages:
    test = read_plain_pickle(file)
    names = texts(read_plain_pickle(meta).get(names_key), meta, names_key)
    pixels, labels = test.get("data"), test.get(key)
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (PIXELS,)):
        raise UserError(f"{file}: has no array `data` of {PIXELS} bytes an image; unpack the data set again")
    return _images(file, pixels, labels, names, wanted)


def _binary(file: Path, label_bytes: int, names_file: Path, wanted: Wanted) -> ArrayImages:
    try:
        content = file.read_bytes()
        names = names_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file.parent}: {error}; unpack the data set again") from None
    length = label_bytes + PIXELS
    if not content or len(content) % length:
        raise UserError(f"{file}: {len(content)} bytes are not whole records of {length}; unpack the data set again")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    # Of CIFAR-100 the first byte is the superclass, which nobody asks for.
    return _images(file, records[:, label_bytes:], records[:, label_bytes - 1], names, wanted)


def _images(file: Path, pixels: np.ndarray, labels: Any, names: list[str], wanted: Wanted) -> ArrayImages:
    try:
        given = np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        given = np.empty(0, np.int64)
    if given.shape != (len(pixels),) or not len(given) or given.min() < 0 or given.max() >= len(names):
        raise UserError(
            f"{file}: its labels are not {len(pixels)} numbers from 0 to {len(names) - 1}; unpack the data set again"
        )
    order = np.asarray(match_classes([[name] for name in names], wanted.classes, file.parent))
    classes = wanted.names() or names
    return ArrayImages(file, pixels.reshape(-1, 3, SIDE, SIDE), order[given], wanted, classes)
