"""Runs whose student learns from a selection, and the figures of diversity beside the prior's own images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffdfkd.engine import distillation
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.reference import REFERENCE, reference_count
from diffdfkd.engine.result_file import read_result
from diffdfkd.engine.selection import Selection, select
from diffdfkd.recipes.distill import distill
from diffdfkd.recipes.run import run

SELECTED = ["selection.disagreement=1.5", "selection.balance=0.5", "selection.duplicates=0.3"]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_journal(folder / "metrics.jsonl") if row["event"] == kind]


def student(folder: Path) -> bytes:
    return (folder / "student" / "student.safetensors").read_bytes()


def unequal(weights: Tensor) -> Tensor:
    """Stands for a teacher that tells images apart, as the tiny one does not."""
    return weights * (1 + torch.arange(len(weights)) % 5)


def test_two_rounds_with_a_selection_killed_and_continued(
    finished_run: tuple[Path, dict[str, Any]], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def telling(*arguments: Any, **options: Any) -> Selection:
        found = select(*arguments, **options)
        return replace(found, weights=unequal(found.weights))

    monkeypatch.setattr(distillation, "select", telling)
    folder = tmp_path / "run"
    recipe = load_recipe(tiny_recipe, [f"output={folder}", *SELECTED])
    result = run(recipe, progress=False)
    first, second = events(folder, "selection")
    assert first["kept"] + first["dropped"]["duplicates"] == 16 and "disagreement" not in first
    assert second["kept"] + second["dropped"]["duplicates"] == 32 and second["disagreement"] > 0
    assert 8 <= first["effective_sample_size"] < first["kept"]
    assert result["selection"].items() <= second.items() and result["selection"]["kept"] == second["kept"]
    assert (
        f"{second['kept']} kept, {second['dropped']['duplicates']} dropped by duplicates"
        in (folder / "report.html").read_text()
    )
    whole = student(folder)
    # The first round's images are those of the run without a selection; its student is another.
    shards = [path / "synthetic" / "round-000" / "shard-00000.tar" for path in (finished_run[0], folder)]
    assert shards[0].read_bytes() == shards[1].read_bytes() and student(finished_run[0]) != whole
    # The end of the second round's training lost.
    for name in ("student.safetensors", "round-001.safetensors"):
        (folder / "student" / name).unlink()
    latest = folder / "student" / "checkpoints" / "latest"
    latest.write_text(next(latest.parent.glob("step-00000075-*")).name)
    run(recipe, progress=False)
    assert events(folder, "distill_start")[-1]["start_step"] == 75
    assert student(folder) == whole


def test_images_of_others_are_selected_too(good_recipe: dict[str, Any], tmp_path: Path) -> None:
    images, folder = tmp_path / "images", tmp_path / "student"
    images.mkdir()
    pixels = torch.randint(0, 256, (12, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for index, image in enumerate([*pixels, pixels[3]]):
        Image.fromarray((image // (1 + index % 4)).numpy()).save(images / f"{index:02d}.png")
    few = ["distillation.batch_size=4", "selection.duplicates=0.2"]
    distill(load_recipe(good_recipe, [f"output={folder}", *few, "selection.balance=0.2"]), images, progress=False)
    (event,) = events(folder, "selection")
    assert (event["kept"], event["dropped"]) == (12, {"duplicates": 1}) and event["effective_sample_size"] <= 12
    # The answers that it was made by are kept.
    assert [*folder.glob("student/logits/part-*.safetensors")]
    tight = [f"output={tmp_path / 'tight'}", *few]
    with pytest.raises(UserError, match=r"^selection: leaves 0 of 13 images.* 13 by selection\.confidence=\[0\.99, 1"):
        distill(load_recipe(good_recipe, [*tight, "selection.confidence=[0.99,1.0]"]), images, progress=False)
    # Nothing was made by then, so that another selection may go on.
    assert distill(load_recipe(good_recipe, [*tight, "selection.confidence=[0.25,1.0]"]), images, progress=False)


def test_a_run_is_compared_with_unguided_images_of_its_prior(good_recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [f"output={folder}", "synthesis.images_per_class=60", "synthesis.batch_size=24", "synthesis.steps=2"]
    recipe = load_recipe(good_recipe, [*settings, "guidance.rho=0.5"])
    assert reference_count(recipe) == 24
    result = run(recipe, progress=False)
    beside = result["diversity"]["beside_unguided"]
    assert beside["images"] == 24 and beside["features"] == "penultimate features"
    assert all(0 <= beside[name] <= 1 for name in ("recall", "precision", "unguided"))
    assert beside["intra_class_distance"]["share"] > 0
    assert read_result(folder / "result.json") == json.loads(json.dumps(result))
    report = (folder / "report.html").read_text()
    assert "Recall of the prior" in report and "of the unguided" in report
    # Made once; a damaged file is made again, to the same bytes.
    content = (folder / REFERENCE).read_bytes()
    assert [row["samples"] for row in events(folder, "reference")] == [24]
    (folder / REFERENCE).write_bytes(content[:200])
    (folder / "result.json").unlink()
    again = run(recipe, progress=False)
    assert (folder / REFERENCE).read_bytes() == content and len(events(folder, "reference")) == 2
    assert again["diversity"] == result["diversity"]


def test_an_unguided_run_and_a_small_one_have_nothing_to_be_compared_with(
    good_run: Path, good_recipe: dict[str, Any]
) -> None:
    assert reference_count(load_recipe(good_recipe, ["synthesis.images_per_class=500"])) == 200
    assert not reference_count(load_recipe(good_recipe, ["synthesis.images_per_class=500", "guidance.mode=none"]))
    assert reference_count(load_recipe(good_recipe, ["synthesis.images_per_class=9999"])) == 256
    assert not (good_run / REFERENCE).exists()
    result = json.loads((good_run / "result.json").read_text())
    assert result["diversity"]["beside_unguided"] is None
