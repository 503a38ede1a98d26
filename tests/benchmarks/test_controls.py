"""The controls' own image sources."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffdfkd.benchmarks.controls import (
    FreshIcons,
    Subset,
    save_predictions,
)
from diffdfkd.benchmarks.tables import write_csv
from diffdfkd.benchmarks.validation_split import idx_bytes
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.idx import read_idx
from diffdfkd.recipes.render_icons import load_glyphs


def icons(seed: int) -> FreshIcons:
    return FreshIcons(load_glyphs(), 1000, seed, Preprocessing(1, 28, (0.5,), (0.5,), "bilinear"))


def test_fresh_icons_are_a_function_of_seed_and_indices() -> None:
    images, labels = icons(0).read([3, 14, 27])
    again, _ = icons(0).read([3, 14, 27])
    other, _ = icons(1).read([3, 14, 27])
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert labels.tolist() == [3, 4, 7]


def test_fresh_icons_are_drawn_anew_at_every_index_and_balanced() -> None:
    images, labels = icons(0).read(range(100))
    assert labels.bincount().tolist() == [10] * 10
    assert len(images.flatten(1).unique(dim=0)) == 100


def test_subset_reads_its_own_indices() -> None:
    chosen = Subset(icons(0), [40, 41, 42])
    assert len(chosen) == 3
    assert chosen.read([2, 0])[1].tolist() == [2, 0]


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
