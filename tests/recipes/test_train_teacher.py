import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import open_images
from diffdfkd.engine.recipe import TeacherRecipe
from diffdfkd.recipes import train_teacher
from diffdfkd.recipes.train_teacher import CLASSES, IMAGES, LABELS, augment, fashion_split, training_files

ASSETS = Path(train_teacher.__file__).parent / "assets" / "fashion"


def test_the_split_is_stratified_disjoint_and_seeded() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 700)).astype(np.uint8)
    training, validation = fashion_split(labels)
    assert len(training) == 2000 and len(validation) == 5000
    assert np.bincount(labels[validation]).tolist() == [500] * 10
    assert np.array_equal(np.sort(np.concatenate([training, validation])), np.arange(7000))
    assert np.array_equal(fashion_split(labels, 0)[1], validation)
    assert not np.array_equal(fashion_split(labels, 1)[1], validation)


def test_augmentation_moves_mirrors_and_erases() -> None:
    images = torch.arange(1, 28 * 28 + 1).float().view(1, 1, 28, 28).expand(200, -1, -1, -1)
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape and changed.max() <= images.max()
    centre = changed[:, 0, 14, 14]
    kept = centre[centre > 0].long() - 1
    rows, columns = kept // 28, kept % 28
    assert rows.unique().tolist() == [12, 13, 14, 15, 16]
    # Column 14 of a mirrored image is column 13 of the image, give or take the shift.
    assert columns.unique().tolist() == [11, 12, 13, 14, 15, 16]
    erased = (changed[:, 0, 4:24, 4:24] == 0).flatten(1).any(1).float().mean()
    assert 0.3 < erased < 0.6
    assert torch.equal(changed, augment(images, torch.Generator().manual_seed(0)))


def write_training_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy set in the format of the official files: the class decides the bright row."""
    labels = np.tile(np.arange(10, dtype=np.uint8), 60)
    pixels = np.random.default_rng(0).integers(0, 60, (600, 28, 28), dtype=np.uint8)
    pixels[np.arange(600), 4 + 2 * labels] = 255
    digests = {}
    for name, array in ((IMAGES, pixels), (LABELS, labels)):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        (folder / name).write_bytes(gzip.compress(content))
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(train_teacher, "DIGESTS", digests)
    monkeypatch.setattr(train_teacher, "VALIDATION_PER_CLASS", 10)


def test_a_toy_teacher_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_training_files(tmp_path, monkeypatch)
    output = tmp_path / "teacher.safetensors"
    application = Typer()
    application.command()(train_teacher.main)
    arguments = ["--data", str(tmp_path), "--output", str(output), "--width", "4", "--epochs", "2", "--seed", "3"]
    result = CliRunner().invoke(application, [*arguments, "--batch-size", "50", "--precision", "float32"])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "teacher.json").read_text())
    assert record["training_images"] == 500 and record["validation_images"] == 100
    recipe = TeacherRecipe(
        architecture="small_cnn",
        weights=str(output),
        **{key: record[key] for key in ("options", "classes", "channels", "size")},
        mean=[record["mean"]],
        std=[record["std"]],
    )
    teacher = build_classifier(recipe, recipe, field="teacher")
    pixels, labels = open_images(tmp_path / IMAGES).read(range(600))
    # The split is that of seed 0, whatever the training's seed.
    _, validation = fashion_split(labels.numpy().astype(np.uint8))
    judged = teacher(pixels[validation].float() / 255).argmax(1)
    assert float((judged == labels[validation]).double().mean()) == pytest.approx(record["validation_accuracy"])


def test_missing_and_altered_training_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dataset-fashion-mnist, or let torchvision fetch .* --download"):
        training_files(tmp_path)
    write_training_files(tmp_path, monkeypatch)
    assert training_files(tmp_path) == (tmp_path / IMAGES, tmp_path / LABELS)
    (tmp_path / LABELS).write_bytes(gzip.compress(b"others"))
    with pytest.raises(UserError, match="not the official"):
        training_files(tmp_path)


def test_the_shipped_teacher_is_what_its_record_says() -> None:
    record = json.loads((ASSETS / "teacher.json").read_text())
    path = ASSETS / "teacher.safetensors"
    assert path.stat().st_size <= 2_000_000
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    recipe = TeacherRecipe(
        architecture=record["architecture"],
        weights=str(path),
        **{key: record[key] for key in ("options", "classes", "channels", "size")},
        mean=[record["mean"]],
        std=[record["std"]],
    )
    teacher = build_classifier(recipe, recipe, field="teacher")
    images = open_images(ASSETS / "test" / "t10k-images-idx3-ubyte.gz", channels=1, classes=CLASSES)
    assert len(images) == 10_000
    pixels, labels = images.read(range(500))
    with torch.no_grad():
        hits = int((teacher(pixels.float() / 255).argmax(1) == labels).sum())
    assert hits >= 450


def test_the_shipped_test_images_are_the_official_files() -> None:
    # As in torchvision.datasets.FashionMNIST.resources.
    official = {
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    stated = (ASSETS / "test" / "README.md").read_text()
    for name, digest in official.items():
        content = (ASSETS / "test" / name).read_bytes()
        assert hashlib.md5(content).hexdigest() == digest
        assert hashlib.sha256(content).hexdigest() in stated
