from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import write_domainnet, write_tiny_imagenet

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 9, 9), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 2, 0]
NAMES = ["aircraft_carrier", "bird", "The Eiffel Tower"]
WNIDS = ["n02124075", "n01443537", "n04146614"]
WORDS = ["Egyptian cat", "goldfish, Carassius auratus", "school bus"]


@pytest.mark.parametrize("inside", [True, False])
def test_domainnet_from_its_test_list(tmp_path: Path, inside: bool) -> None:
    folder, listing = write_domainnet(tmp_path, IMAGES, LABELS, NAMES)
    path = folder if inside else tmp_path
    pixels, labels = open_images(path, listing).read(range(6))
    assert torch.equal(pixels, torch.from_numpy(IMAGES)) and labels.tolist() == LABELS
    # The folders' names decide, not the list's numbers; classes without an image in the list are no mistake.
    classes = ["bird", "the-eiffel-tower", "zebra", "aircraft carrier"]
    images = open_images(path, listing, classes=classes)
    assert images.classes == classes and images.read(range(6))[1].tolist() == [1, 3, 0, 0, 1, 3]
    with pytest.raises(UserError, match=r"clipart_test\.txt: its 3 classes do not match .* the teacher has no bird"):
        open_images(path, listing, classes=["aircraft carrier", "the eiffel tower", "birds"])


def test_a_list_for_a_flat_folder(tmp_path: Path) -> None:
    folder, _ = write_domainnet(tmp_path, IMAGES, [0] * 6, ["all"])
    names = sorted(file.name for file in folder.glob("*/*_00000*.jpg"))
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("".join(f"all/{name} {label}\n" for name, label in zip(names, LABELS, strict=True)))
    assert open_images(folder, numbers, classes=["a", "b", "c"]).read(range(6))[1].tolist() == LABELS
    with pytest.raises(UserError, match=r"numbers\.txt: label 2 is outside the classes; allowed: 0 to 1"):
        open_images(folder, numbers, classes=["a", "b"])
    words = tmp_path / "words.txt"
    words.write_text("".join(f"all/{name} {'xyz'[label]}\n" for name, label in zip(names, LABELS, strict=True)))
    assert open_images(folder, words, classes=["z", "y", "x"]).read(range(6))[1].tolist() == [0, 2, 1, 1, 0, 2]
    assert open_images(folder, words).classes == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "names no images"),
        (b"clipart/bird/a.jpg\n", "line 1 is not `file label`"),
        (b"../clipart/bird/a.jpg 1\n", "line 1 leads out of"),
        (b"/etc/hostname 1\n", "line 1 leads out of"),
        (b"clipart/bird/absent.jpg 1\n", "clipart/bird/absent.jpg is not below"),
        (b"\x1f\x8b\xff", "not a text file"),
    ],
)
def test_a_list_that_does_not_serve_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    folder, listing = write_domainnet(tmp_path, IMAGES, LABELS, NAMES)
    listing.write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        open_images(folder, listing)
    assert str(caught.value).startswith(f"{listing}: ")
    with pytest.raises(UserError, match="no such file"):
        open_images(folder, tmp_path / "absent.txt")


@pytest.mark.parametrize("classes", [WNIDS, WORDS, ["egyptian-cat", "Carassius auratus", "School bus"]])
def test_tiny_imagenets_validation_images(tmp_path: Path, classes: list[str]) -> None:
    folder = write_tiny_imagenet(tmp_path, IMAGES, LABELS, WNIDS, WORDS)
    for path in (folder, folder / "val", tmp_path):
        pixels, labels = open_images(path, classes=[classes[2], classes[0], classes[1]]).read(range(6))
        assert torch.equal(pixels, torch.from_numpy(IMAGES)) and labels.tolist() == [0, 1, 2, 2, 0, 1]
    assert open_images(folder).classes == WNIDS
    with pytest.raises(UserError, match="the teacher has no n02124075; the data set has no tabby cat"):
        open_images(folder, classes=["tabby cat", *WORDS[1:]])
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace(WNIDS[0], "n00000000"))
    with pytest.raises(UserError, match=r"val_annotations\.txt: line 2 is not a file and a known wnid"):
        open_images(folder)
