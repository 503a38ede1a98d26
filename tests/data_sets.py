"""Writers of small stand-ins for published data sets, in the very layout in which those are unpacked.

Images are uint8 arrays [n,C,h,w], labels integers [n]. Training files are written too, with content that no reader
gets over, since only test splits may be read.
"""

import gzip
import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"thing_{number:03d}" for number in range(100))
TRAINING = b"a training file, which evaluation does not read"


def write_cifar10(root: Path, images: Any, labels: Any, names: Sequence[str] = CIFAR10, binary: bool = False) -> Path:
    """``cifar-10-batches-py``, or with `binary` ``cifar-10-batches-bin``, under `root`; images are [n,3,32,32]."""
    images, labels = _checked(images, labels)
    folder = _new(root / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py"))
    suffix = ".bin" if binary else ""
    for number in range(1, 6):
        (folder / f"data_batch_{number}{suffix}").write_bytes(TRAINING)
    if binary:
        (folder / "batches.meta.txt").write_text("".join(f"{name}\n" for name in names) + "\n")
        (folder / "test_batch.bin").write_bytes(_records(labels[:, None], images))
        return folder
    meta = {"num_cases_per_batch": 10000, "label_names": list(names), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    test = {
        "batch_label": "testing batch 1 of 1",
        "labels": labels.tolist(),
        "data": images.reshape(len(images), -1),
        "filenames": [f"image_{number}.png" for number in range(len(images))],
    }
    (folder / "test_batch").write_bytes(python2_pickle(test))
    return folder


def write_cifar100(root: Path, images: Any, labels: Any, names: Sequence[str] = CIFAR100, binary: bool = False) -> Path:
    """``cifar-100-python``, or with `binary` ``cifar-100-binary``, under `root`; images are [n,3,32,32]."""
    images, labels = _checked(images, labels)
    folder = _new(root / ("cifar-100-binary" if binary else "cifar-100-python"))
    coarse = labels // 5
    groups = [f"group_{number}" for number in range(-(-len(names) // 5))]
    if binary:
        (folder / "train.bin").write_bytes(TRAINING)
        (folder / "fine_label_names.txt").write_text("".join(f"{name}\n" for name in names))
        (folder / "coarse_label_names.txt").write_text("".join(f"{name}\n" for name in groups))
        (folder / "test.bin").write_bytes(_records(np.stack([coarse, labels], 1), images))
        return folder
    (folder / "train").write_bytes(TRAINING)
    (folder / "meta").write_bytes(python2_pickle({"fine_label_names": list(names), "coarse_label_names": groups}))
    test = {
        "filenames": [f"image_{number}.png" for number in range(len(images))],
        "batch_label": "testing batch 1 of 1",
        "fine_labels": labels.tolist(),
        "coarse_labels": coarse.tolist(),
        "data": images.reshape(len(images), -1),
    }
    (folder / "test").write_bytes(python2_pickle(test))
    return folder


def write_mnist(root: Path, images: Any, labels: Any, name: str = "MNIST", packed: bool = False) -> Path:
    """``MNIST/raw`` under `root`, or ``FashionMNIST/raw`` by its name; images are [n,28,28] or [n,1,28,28]."""
    images, labels = _checked(images, labels)
    images = images.reshape(len(images), *images.shape[-2:])
    folder = _new(root / name / "raw")
    for part, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        file = f"t10k-{part}-ubyte" + (".gz" if packed else "")
        (folder / file).write_bytes(gzip.compress(content) if packed else content)
        (folder / f"train-{part}-ubyte").write_bytes(TRAINING)
    return folder


def write_tiny_imagenet(root: Path, images: Any, labels: Any, wnids: Sequence[str], words: Sequence[str]) -> Path:
    """``tiny-imagenet-200`` under `root`: ``val/images`` with its annotations, ``wnids.txt`` and ``words.txt``."""
    images, labels = _checked(images, labels)
    folder = _new(root / "tiny-imagenet-200")
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    lines = [f"{wnid}\t{word}\n" for wnid, word in zip(wnids, words, strict=True)]
    (folder / "words.txt").write_text("".join(["n00001740\tentity\n", *lines]))
    for wnid in wnids:
        file = _new(folder / "train" / wnid / "images") / f"{wnid}_0.JPEG"
        file.write_bytes(TRAINING)
    test = _new(folder / "val" / "images")
    annotations = ""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        # Lossless content under the set's own suffix: readers go by content.
        (test / f"val_{number}.JPEG").write_bytes(_png(image))
        annotations += f"val_{number}.JPEG\t{wnids[label]}\t0\t0\t{image.shape[2] - 1}\t{image.shape[1] - 1}\n"
    (folder / "val" / "val_annotations.txt").write_text(annotations)
    return folder


def write_domainnet(
    root: Path, images: Any, labels: Any, names: Sequence[str], domain: str = "clipart"
) -> tuple[Path, Path]:
    """``clipart/<class>/*.jpg`` under `root` and the lists ``clipart_test.txt`` and ``clipart_train.txt``.

    Returns the folder of the domain and the list of its test images.
    """
    images, labels = _checked(images, labels)
    folder = _new(root / domain)
    lines = ""
    for label, name in enumerate(names):
        (_new(folder / name) / f"{domain}_{label:03d}_training.jpg").write_bytes(TRAINING)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = f"{domain}/{names[label]}/{domain}_{label:03d}_{number:06d}.jpg"
        (root / file).write_bytes(_png(image))
        lines += f"{file} {label}\n"
    (root / f"{domain}_test.txt").write_text(lines)
    training = "".join(
        f"{domain}/{name}/{domain}_{label:03d}_training.jpg {label}\n" for label, name in enumerate(names)
    )
    (root / f"{domain}_train.txt").write_text(training)
    return folder, root / f"{domain}_test.txt"


def write_class_folders(folder: Path, images: Any, labels: Any, names: Sequence[str]) -> Path:
    """``folder/<name>/<number>.png``; with wnids as names, ImageNet's ``val`` as torchvision sorts it."""
    images, labels = _checked(images, labels)
    for name in names:
        _new(folder / name)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / names[label] / f"{number:06d}.png").write_bytes(_png(image))
    return folder


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2 and NumPy 1 wrote it, with 8-bit strings: so are the published CIFAR files."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, str):
        text = value.encode()
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"u"
    rows, columns = value.shape
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = value.astype(np.uint8).tobytes()
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = _opcodes(rows) + _opcodes(columns) + b"\x86"
    return made + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"


def _records(labels: np.ndarray, images: np.ndarray) -> bytes:
    return np.concatenate([labels.astype(np.uint8), images.reshape(len(images), -1)], axis=1).tobytes()


def _checked(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.ascontiguousarray(np.asarray(images, dtype=np.uint8)), np.asarray(labels, dtype=np.int64)
    assert len(images) == len(labels)
    return images, labels


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()
