from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import write_cifar10, write_mnist

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
LABELS = [3, 0, 1, 9, 2, 2, 5]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_raw_mnist_by_any_of_its_folders(tmp_path: Path, name: str, packed: bool) -> None:
    folder = write_mnist(tmp_path, IMAGES, LABELS, name, packed)
    for path in (folder, folder.parent, tmp_path):
        pixels, labels = open_images(path, channels=3).read(range(7))
        assert torch.equal(pixels, torch.from_numpy(IMAGES)[:, None].expand(-1, 3, -1, -1))
        assert labels.tolist() == LABELS
    with pytest.raises(UserError, match="label 9 is outside the classes"):
        open_images(folder, classes=list("abcde"))


def test_labels_may_be_packed_otherwise_than_images(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path, IMAGES, LABELS)
    write_mnist(tmp_path, IMAGES, LABELS, packed=True)
    (folder / "t10k-images-idx3-ubyte").unlink()
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert open_images(folder).read(range(7))[1].tolist() == LABELS
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no labels file beside it"):
        open_images(folder)


def test_of_several_data_sets_one_is_to_be_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, IMAGES, LABELS)
    write_cifar10(tmp_path, np.zeros((1, 3, 32, 32)), [0])
    with pytest.raises(UserError, match=r"holds several data sets; give one of .*cifar-10-batches-py, .*MNIST/raw"):
        open_images(tmp_path)


def test_an_empty_folder_of_a_known_name_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "tiny-imagenet-200").mkdir()
    with pytest.raises(UserError, match=r"wnids\.txt or val/val_annotations\.txt is missing"):
        open_images(tmp_path / "tiny-imagenet-200")
