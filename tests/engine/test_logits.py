import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine import logits
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.logits import Logits, Part, Stale, folder_parts, keep_logits, read_part, uses_cache


class Noise:
    classes: list[str] | None = None

    def __init__(self, images: int = 23) -> None:
        self.pixels = torch.randint(0, 256, (images, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Any) -> tuple[Tensor, Tensor]:
        self.reads += len(indices)
        return self.pixels[list(indices)], torch.zeros(len(indices), dtype=torch.int64)


def teacher(seed: int = 0, mean: float = 0.5) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Classifier(model, Preprocessing(1, 8, (mean,), (0.5,), "bilinear"), list("abc")).requires_grad_(False).eval()


def keep(folder: Path, images: Noise, by: Classifier, parts: list[Part], **options: Any) -> tuple[Logits, list[Any]]:
    """The answers, and the events journalled."""
    with Journal(folder / "metrics.jsonl") as journal:
        given = {"dtype": "float32", "device": torch.device("cpu"), "journal": journal, "progress": False, **options}
        kept = keep_logits(by, images, parts, **given)
    return kept, read_journal(folder / "metrics.jsonl")


def parts_of(folder: Path) -> list[Part]:
    return [Part(folder / f"{number}.safetensors", n, f"source {number}") for number, n in enumerate((10, 1, 12))]


def test_answers_are_the_teachers_and_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "TOGETHER", 4)
    images, parts = Noise(), parts_of(tmp_path / "kept")
    kept, events = keep(tmp_path, images, teacher(), parts)
    expected = teacher()(images.pixels.float() / 255)
    order = torch.tensor([22, 0, 10, 11, 9, 9, 5])
    torch.testing.assert_close(kept.read(order), expected[order])
    assert images.reads == 23 and (events[-1]["files"], events[-1]["made"]) == (3, 3)
    content = [part.file.read_bytes() for part in parts]
    again, events = keep(tmp_path, images, teacher(), parts)
    assert images.reads == 23 and events[-1]["made"] == 0
    assert torch.equal(again.read(torch.arange(23)), kept.read(torch.arange(23)))
    # One file lost: it comes back with the same bytes, whatever the others hold.
    parts[2].file.unlink()
    keep(tmp_path, images, teacher(), parts)
    assert images.reads == 35 and content == [part.file.read_bytes() for part in parts]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("truncate", "unreadable"),
        ("flip", "its content differs from its digest"),
        ("images", "it belongs to other images"),
        ("fewer", r"it holds \[10, 3\] torch.float32, not \[9, 3\]"),
        ("teacher", "it belongs to another teacher"),
        ("preprocessing", "it belongs to another teacher, preprocessing or arithmetic"),
        ("dtype", "it belongs to another teacher, preprocessing or arithmetic"),
    ],
)
def test_stale_and_damaged_files_are_made_again_with_the_reason(
    tmp_path: Path, change: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    images, by, options, parts = Noise(10), teacher(), {}, parts_of(tmp_path / "kept")[:1]
    keep(tmp_path, images, by, parts)
    file = parts[0].file
    content = file.read_bytes()
    if change == "truncate":
        file.write_bytes(content[:-3])
    elif change == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "images":
        parts = [Part(file, 10, "others")]
    elif change == "fewer":
        images, parts = Noise(9), [Part(file, 9, "source 0")]
    elif change == "teacher":
        by = teacher(1)
    elif change == "preprocessing":
        by = teacher(mean=0.4)
    else:
        options = {"dtype": "bfloat16"}
    _, events = keep(tmp_path, images, by, parts, **options)
    assert events[-1]["made"] == 1
    remade = [event["reason"] for event in events if event["event"] == "remake_logits"]
    assert len(remade) == 1 and re.search(reason, remade[0])
    assert f"{file} is made again: " in caplog.text
    assert not list(file.parent.glob(".*"))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("in the way")
    with pytest.raises(UserError, match=r"distillation\.teacher_logits: .*cannot be written .* computed"):
        keep(tmp_path, Noise(10), teacher(), parts_of(tmp_path / "kept")[:1])
    with pytest.raises(Stale, match="missing"):
        read_part(parts_of(tmp_path / "elsewhere")[0], "", 3)
    with pytest.raises(ValueError, match="the parts are of 23 images, there are 10"):
        keep(tmp_path, Noise(10), teacher(), parts_of(tmp_path))


def test_a_folder_is_cut_into_parts(tmp_path: Path) -> None:
    parts = folder_parts(tmp_path, 2 * logits.PART + 1, "digest")
    assert [part.images for part in parts] == [logits.PART, logits.PART, 1]
    assert len({part.file for part in parts}) == len({part.source for part in parts}) == 3


@pytest.mark.parametrize(
    ("asked", "augmentation", "images", "cached", "reason"),
    [
        ("auto", [], 100, True, "one answer"),
        ("auto", [], 100_000, False, "fewer images than there are"),
        ("auto", ["flip"], 100, False, "flip"),
        ("computed", [], 100, False, "as asked"),
        ("cached", [], 100_000, True, "as asked"),
        ("cached", ["flip", "crop"], 100, True, "before flip, crop"),
    ],
)
def test_when_answers_are_kept(asked: Any, augmentation: Any, images: int, cached: bool, reason: str) -> None:
    recipe = DistillationRecipe(steps=100, batch_size=10, teacher_logits=asked, augmentation=augmentation)
    kept, why = uses_cache(recipe, images)
    assert kept == cached and reason in why
