"""Runs on shared images give what an undisturbed run gives, byte for byte; comparisons are judged as runs are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffdfkd.benchmarks.ablation import comparisons
from diffdfkd.benchmarks.ablation.plan import Run, plan_stores
from diffdfkd.benchmarks.ablation.worker import ROW, Job, read_predictions, work, write_job
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.recipes.launch import settle_machine
from diffdfkd.recipes.run import run as run_alone

Made = Callable[[Path], dict[str, bytes]]


def recipe_of(file: Path | dict[str, Any], *overrides: str) -> Recipe:
    return settle_machine(load_recipe(file, overrides))


def do(kind: Any, recipe: Recipe, folder: Path, store: Path | None = None) -> dict[str, Any]:
    """Do a job in this process; its row."""
    job = Job(kind, {**dump_recipe(recipe), "output": str(folder)}, {"a": 1}, store and str(store))
    work(write_job(job))
    return json.loads((folder / ROW).read_text())["row"] if kind != "store" else {}


def make_store(recipe: Recipe, folder: Path) -> Path:
    (store,) = plan_stores([Run("x", "a", 0, "synthetic", recipe)]).values()
    do("store", store.recipe, folder)
    return folder


def test_a_run_in_rounds_on_a_store_is_the_run(
    tiny_recipe: Path, finished_run: tuple[Path, dict[str, Any]], tmp_path: Path, made: Made
) -> None:
    recipe = recipe_of(tiny_recipe)
    store = make_store(recipe, tmp_path / "store")
    assert not (store / "synthetic" / "round-001").exists()
    row = do("synthetic", recipe, tmp_path / "run", store)
    alone, result = finished_run
    assert made(tmp_path / "run") == made(alone)
    assert row["student_accuracy"] == pytest.approx(result["student_accuracy"], abs=1e-4)
    assert row["images"] == 32 and row["synthesis_seconds"] >= 0 and row["images_per_second"] > 0
    assert row["engine"] == "eager" and row["threads"] == 1


def test_a_smaller_run_takes_whole_shards_and_makes_the_last(
    good_recipe: dict[str, Any], tmp_path: Path, made: Made
) -> None:
    # Shards of 4: the smaller one's second is not full.
    larger, smaller = (
        recipe_of(
            {**good_recipe, "synthesis": {**good_recipe["synthesis"], "batch_size": size}},
            f"synthesis.images_per_class={count}",
        )
        for size, count in ((6, 3), (6, 2))
    )
    store = make_store(larger, tmp_path / "store")
    do("synthetic", smaller, tmp_path / "run", store)
    run_alone(smaller.model_copy(update={"output": str(tmp_path / "alone")}), progress=False)
    assert made(tmp_path / "run") == made(tmp_path / "alone")
    first = "synthetic/round-000/shard-00000.tar"
    shards = sorted(path.name for path in (tmp_path / "run" / "synthetic" / "round-000").glob("*.tar"))
    assert len(shards) == 2, first
    inodes = [(tmp_path / name / "synthetic" / "round-000" / shards[0]).stat().st_ino for name in ("store", "run")]
    assert inodes[0] == inodes[1], "the shard was copied or made again"


def test_training_alone_differs_on_the_same_images(good_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(good_recipe)
    store = make_store(recipe, tmp_path / "store")
    longer = recipe_of(good_recipe, "distillation.steps=8")
    rows = [do("synthetic", each, tmp_path / str(index), store) for index, each in enumerate((recipe, longer))]
    assert [row["steps"] for row in rows] == [4, 8]
    assert rows[0]["synthesis_seconds"] == rows[1]["synthesis_seconds"]
    assert not (tmp_path / "1" / "preview").exists(), "the prior was loaded"
    assert len(list(tmp_path.glob("teacher-*.npy"))) == 1, "the teacher is asked once"
    run_alone(longer.model_copy(update={"output": str(tmp_path / "alone")}), progress=False)
    student = Path("student", "student.safetensors")
    assert (tmp_path / "1" / student).read_bytes() == (tmp_path / "alone" / student).read_bytes()
    result = json.loads((tmp_path / "alone" / "result.json").read_text())
    for key in ("student_accuracy", "teacher_accuracy", "agreement"):
        assert rows[1][key] == pytest.approx(result[key], abs=1e-4)
    predictions = read_predictions(tmp_path / "1")
    assert predictions.shape == (32,) and np.mean(predictions == np.arange(32) % 4) == pytest.approx(
        rows[1]["student_accuracy"], abs=1e-4
    )


def test_a_store_of_other_choices_is_refused(good_recipe: dict[str, Any], tmp_path: Path) -> None:
    store = make_store(recipe_of(good_recipe), tmp_path / "store")
    other = recipe_of(good_recipe, "guidance.rho=0.3", "synthesis.images_per_class=3")
    with pytest.raises(UserError, match=r"made by another recipe \(guidance.rho was 0.15 and is 0.3\)"):
        do("synthetic", other, tmp_path / "run", store)
    with pytest.raises(UserError, match="holds no images"):
        do("synthetic", other, tmp_path / "run", tmp_path / "nothing")


class Bright:
    """Images of one grey level a class."""

    classes: list[str] | None = None

    def __len__(self) -> int:
        return 16

    def read(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.tensor(list(indices)) % 4
        return (labels * 60).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28), labels


def test_a_comparison_is_trained_and_judged_alike(
    good_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "comparison_images", lambda recipe, source: Bright())
    row = do("oracle", recipe_of(good_recipe), tmp_path / "run")
    assert (row["images"], row["synthesis_seconds"], row["network_evaluations"]) == (16, 0.0, 0)
    assert 0 <= row["agreement"] <= 1 and len(read_predictions(tmp_path / "run")) == 32
    assert set(row) == set(
        do("synthetic", recipe_of(good_recipe), tmp_path / "b", make_store(recipe_of(good_recipe), tmp_path / "s"))
    )
