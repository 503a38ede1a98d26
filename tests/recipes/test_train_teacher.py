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
from diffdfkd.engine.images import open_images
from diffdfkd.engine.recipe import TeacherRecipe
from diffdfkd.recipes import teacher_data, train_teacher
from diffdfkd.recipes.teacher_data import IMAGES, LABELS, held_out
from diffdfkd.recipes.train_teacher import augment

ASSETS = Path(train_teacher.__file__).parent / "assets"


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
    monkeypatch.setattr(teacher_data, "DIGESTS", digests)
    monkeypatch.setattr(teacher_data, "VALIDATION_PER_CLASS", 10)


@pytest.mark.parametrize(("given", "architecture"), [([], "small_cnn"), (["--architecture", "resnet18"], "resnet18")])
def test_a_toy_teacher_from_the_command_line(
    given: list[str], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_training_files(tmp_path, monkeypatch)
    output = tmp_path / "teacher.safetensors"
    application = Typer()
    application.command()(train_teacher.main)
    arguments = ["--data", str(tmp_path), "--output", str(output), "--width", "4", "--epochs", "2", "--seed", "3"]
    arguments += given
    result = CliRunner().invoke(application, [*arguments, "--batch-size", "50", "--precision", "float32"])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "teacher.json").read_text())
    assert record["training_images"] == 500 and record["validation_images"] == 100
    assert record["architecture"] == architecture and record["options"] == {"width": 4}
    recipe = TeacherRecipe(
        architecture=architecture,
        weights=str(output),
        **{key: record[key] for key in ("options", "classes", "channels", "size")},
        mean=[record["mean"]],
        std=[record["std"]],
    )
    teacher = build_classifier(recipe, recipe, field="teacher")
    pixels, labels = open_images(tmp_path / IMAGES).read(range(600))
    # The split is that of seed 0, whatever the training's seed.
    _, validation = held_out(labels.numpy().astype(np.uint8))
    judged = teacher(pixels[validation].float() / 255).argmax(1)
    assert float((judged == labels[validation]).double().mean()) == pytest.approx(record["validation_accuracy"])


@pytest.mark.parametrize(
    ("name", "file", "images", "least"),
    [
        ("fashion", "teacher", "t10k-images-idx3-ubyte.gz", 450),
        ("fashion", "resnet18", "t10k-images-idx3-ubyte.gz", 450),
        ("digits", "teacher", "images-idx3-ubyte.gz", 485),
    ],
)
def test_the_shipped_teachers_are_what_their_records_say(name: str, file: str, images: str, least: int) -> None:
    record = json.loads((ASSETS / name / f"{file}.json").read_text())
    path = ASSETS / name / f"{file}.safetensors"
    assert path.stat().st_size <= 3_000_000
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    recipe = TeacherRecipe(
        architecture=record["architecture"],
        weights=str(path),
        **{key: record[key] for key in ("options", "classes", "channels", "size")},
        mean=[record["mean"]],
        std=[record["std"]],
    )
    teacher = build_classifier(recipe, recipe, field="teacher")
    source = open_images(ASSETS / name / "test" / images, channels=1, classes=record["classes"])
    pixels, labels = source.read(range(0, len(source), len(source) // 500))
    with torch.no_grad():
        hits = int((teacher(pixels.float() / 255).argmax(1) == labels).sum())
    assert hits >= least


def test_the_shipped_test_images_are_the_official_files() -> None:
    # As in torchvision.datasets.FashionMNIST.resources.
    official = {
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    stated = (ASSETS / "fashion" / "test" / "README.md").read_text()
    for name, digest in official.items():
        content = (ASSETS / "fashion" / "test" / name).read_bytes()
        assert hashlib.md5(content).hexdigest() == digest
        assert hashlib.sha256(content).hexdigest() in stated
