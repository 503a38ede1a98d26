import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from data_sets import CIFAR10, CIFAR100, write_cifar10, write_cifar100
from PIL import Image

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 30)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("write, names", [(write_cifar10, CIFAR10), (write_cifar100, CIFAR100)])
def test_the_test_images_with_labels_in_the_teachers_order(tmp_path: Path, write, names, binary) -> None:  # type: ignore[no-untyped-def]
    folder = write(tmp_path, IMAGES, LABELS, binary=binary)
    images = open_images(folder)
    pixels, labels = images.read([4, 0])
    assert torch.equal(pixels, torch.from_numpy(IMAGES[[4, 0]])) and labels.tolist() == LABELS[[4, 0]].tolist()
    assert images.classes == list(names) and len(images) == 30 and images.first_unlabelled() is None
    turned = [name.upper().replace("_", " ") for name in names[::-1]]
    images = open_images(folder, classes=turned)
    assert images.read(range(30))[1].tolist() == [len(names) - 1 - label for label in LABELS]
    assert images.classes == turned
    # The data root that torchvision was given will do, too.
    assert len(open_images(tmp_path)) == 30


def test_torchvision_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar10(tmp_path, IMAGES, LABELS)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(torchvision.datasets.CIFAR10.meta, "md5", None)
    theirs = torchvision.datasets.CIFAR10(tmp_path, train=False)
    pixels, labels = open_images(folder, channels=1, size=24, crop_fraction=0.8, classes=theirs.classes).read(range(30))
    for (image, target), ours, label in zip(theirs, pixels, labels.tolist(), strict=True):
        edge = image.convert("L").resize((30, 30), Image.Resampling.BILINEAR).crop((3, 3, 27, 27))
        assert np.array_equal(ours[0].numpy(), np.asarray(edge)) and target == label


def test_classes_that_do_not_match_are_refused(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path, IMAGES, LABELS)
    with pytest.raises(UserError, match=r"the teacher has no automobile; the data set has no car; name teacher\.cla"):
        open_images(folder, classes=["car" if name == "automobile" else name for name in CIFAR10])
    with pytest.raises(UserError, match=r"its 10 classes do not match the 9"):
        open_images(folder, classes=CIFAR10[:9])
    numbered = open_images(folder, classes=[str(number) for number in range(10)])
    assert numbered.read(range(30))[1].tolist() == LABELS.tolist()


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.system, (f"touch {self.path}",)


def test_damage_is_named_and_code_not_run(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path, IMAGES, LABELS)
    whole = (folder / "test_batch").read_bytes()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Hostile(tmp_path / "ran")}))
    with pytest.raises(UserError, match=r"test_batch: .*it asks for posix\.system"):
        open_images(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "test_batch").write_bytes(pickle.dumps({"labels": [1]}))
    with pytest.raises(UserError, match="has no array `data` of 3072 bytes an image"):
        open_images(folder)
    (folder / "test_batch").write_bytes(pickle.dumps({"labels": [10], "data": IMAGES[:1].reshape(1, -1)}))
    with pytest.raises(UserError, match="labels are not 1 numbers from 0 to 9"):
        open_images(folder)
    (folder / "test_batch").write_bytes(whole)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": 3}))
    with pytest.raises(UserError, match=r"batches\.meta: has no list of names label_names"):
        open_images(folder)
    (folder / "batches.meta").unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py: batches\.meta or test_batch is missing"):
        open_images(folder)
    binary = write_cifar100(tmp_path, IMAGES, LABELS, binary=True) / "test.bin"
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test\.bin: 92219 bytes are not whole records of 3074"):
        open_images(binary.parent)
