"""Runs whose student begins with a part of the teacher's weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.inventory import take_stock
from diffdfkd.recipes.run import run

INHERITED = "student.initialization=teacher"


def test_a_run_trains_on_from_the_teachers_weights(good_recipe: dict[str, Any], tmp_path: Path) -> None:
    still = ["distillation.steps=1", "distillation.learning_rate=1e-9"]
    recipe = load_recipe(good_recipe, [INHERITED, *still, f"output={tmp_path / 'run'}"])
    run(recipe, progress=False)
    teacher = load_file(str(recipe.teacher.weights))
    student = load_file(tmp_path / "run" / "student" / "student.safetensors")
    first = student["features.0.0.weight"]
    rows = [index for weights in first for index, theirs in enumerate(teacher["features.0.0.weight"])
            if torch.allclose(theirs, weights, atol=1e-6)]  # fmt: skip
    assert len(rows) == 2 and len(set(rows)) == 2
    wanted = build_classifier(recipe.student, recipe.teacher, field="student", seed=recipe.seed).model.state_dict()
    trained = [name for name, value in wanted.items() if "running" not in name and value.is_floating_point()]
    for name in trained:
        torch.testing.assert_close(student[name], wanted[name], rtol=0, atol=1e-6)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "Its initial weights are a part of the teacher's" in " ".join(card.split())
    assert "weights are random" not in " ".join(card.split())


def test_dry_run_says_where_the_student_begins(good_recipe: dict[str, Any]) -> None:
    def said(*overrides: str) -> str:
        items = take_stock(load_recipe(good_recipe, overrides))
        return next(str(item.found) for item in items if item.name == "student")

    assert "begins with weights of the teacher" in said(INHERITED)
    assert said().endswith(", new")
    missing = copy.deepcopy(good_recipe)
    missing["teacher"]["weights"] = "nowhere.safetensors"
    assert any(item.name == "student" and item.found for item in take_stock(load_recipe(missing, [INHERITED])))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.weights=s.safetensors"], "student.initialization: teacher, but student.weights names s.safetensors"),
        (
            ["teacher.architecture=exported", "teacher.options={}", "guidance.batchnorm_weight=0"],
            "student.initialization: teacher, but teacher.architecture is exported",
        ),
    ],
)
def test_what_does_not_go_together(good_recipe: dict[str, Any], overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(good_recipe, [INHERITED, *overrides])
    assert words in str(refused.value)
