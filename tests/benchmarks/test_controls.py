"""The controls' own image sources."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffdfkd.benchmarks.control_images import DRAWINGS, FreshImages, oracle_images, setting
from diffdfkd.benchmarks.controls import save_predictions
from diffdfkd.benchmarks.tables import write_csv
from diffdfkd.benchmarks.validation_split import idx_bytes
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_idx
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.teacher_data import READERS, TeacherData


def fresh(name: str, seed: int) -> FreshImages:
    return FreshImages(DRAWINGS[name](), 1000, seed, Preprocessing(1, 28, (0.5,), (0.5,), "bilinear"))


@pytest.mark.parametrize("name", DRAWINGS)
def test_fresh_images_are_a_function_of_seed_and_indices(name: str) -> None:
    images, labels = fresh(name, 0).read([3, 14, 27])
    again, _ = fresh(name, 0).read([3, 14, 27])
    other, _ = fresh(name, 1).read([3, 14, 27])
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert labels.tolist() == [3, 4, 7]


@pytest.mark.parametrize("name", DRAWINGS)
def test_fresh_images_are_drawn_anew_at_every_index_and_balanced(name: str) -> None:
    images, labels = fresh(name, 0).read(range(100))
    assert labels.bincount().tolist() == [10] * 10
    assert len(images.flatten(1).unique(dim=0)) == 100


def test_fresh_digits_look_like_the_digit_that_they_are() -> None:
    """The mean image of each digit is nearest to the mean of the same digit under another seed."""
    means = []
    for seed in (0, 1):
        images, labels = fresh("digits", seed).read(range(300))
        means.append(torch.stack([images[labels == digit].float().mean(0).flatten() for digit in range(10)]))
    assert torch.cdist(*means).argmin(1).tolist() == list(range(10))


def test_the_setting_is_that_of_the_prior() -> None:
    assert [setting(load_recipe(name)) for name in ("fashion", "throughput_fashion", "digits")] == [
        "fashion",
        "fashion",
        "digits",
    ]
    with pytest.raises(UserError, match=r"prior\.path: .* none of those that controls exist for, fashion and digits"):
        setting(load_recipe("fashion", ["prior.path=elsewhere"]))


def test_the_oracle_never_draws_from_validation_or_test(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(60, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    parts = (np.arange(0, 40), np.arange(40, 50), np.arange(50, 60))
    known = TeacherData("digits", "none", tuple("0123456789"), pixels, pixels[:, 0, 0] % 10, *parts, {})
    monkeypatch.setitem(READERS, "digits", lambda data, download: known)
    drawn = {}
    for seed in (0, 1):
        images = oracle_images(load_recipe("digits", ["synthesis.images_per_class=2", f"seed={seed}"]))
        found, labels = images.read(range(len(images)))
        rows = found[:, 0, 0, 0].tolist()
        assert len(set(rows)) == 20 and max(rows) < 40
        assert labels.tolist() == [row % 10 for row in rows]
        drawn[seed] = rows
    assert drawn[0] != drawn[1]
    assert len(oracle_images(load_recipe("digits", ["synthesis.images_per_class=100"]))) == 40


def test_tables_and_idx_files_are_read_back(tmp_path: Path) -> None:
    write_csv(tmp_path / "new" / "table.csv", [{"variant": "guided", "seed": 0}, {"variant": "oracle", "seed": 1}])
    with (tmp_path / "new" / "table.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["guided", "oracle"]
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "images-idx3-ubyte").write_bytes(idx_bytes(images))
    assert np.array_equal(read_idx(tmp_path / "images-idx3-ubyte", 3), images)


class Half:
    """Four images, the first two bright; labels say so."""

    classes: list[str] | None = None

    def __len__(self) -> int:
        return 4

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        bright = torch.tensor([250, 240, 10, 5], dtype=torch.uint8)[list(indices)]
        return bright.view(-1, 1, 1, 1).expand(-1, 1, 28, 28), torch.tensor([1, 1, 0, 0])[list(indices)]


def test_predictions_are_those_of_the_evaluation(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(2, affine=False)
    norm.running_mean = torch.tensor([0.0, 0.5])
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False), norm)
    nn.init.constant_(model[2].weight, 0.0)
    model[2].weight.data[1] = 1.0
    student = Classifier(model, Preprocessing(1, 28, (0.0,), (1.0,), "bilinear"), ["dark", "bright"])
    save_predictions(tmp_path, student.train(), Half(), 1.0)
    assert np.load(tmp_path / "predictions.npy").tolist() == [1, 1, 0, 0]
    assert torch.equal(norm.running_mean, torch.tensor([0.0, 0.5])), "the student was judged in train mode"
    with pytest.raises(RuntimeError, match=r"predictions give an accuracy of 1\.0"):
        save_predictions(tmp_path, student, Half(), 0.5)
