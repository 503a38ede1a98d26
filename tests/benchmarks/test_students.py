"""A student of an ablation is trained as its recipe says."""

from pathlib import Path
from typing import Any

import pytest

from diffdfkd.benchmarks import students
from diffdfkd.engine.array_images import ArrayImages
from diffdfkd.engine.recipe import load_recipe


class Seen(Exception):
    """Ends a training once it is known what it was given."""


def test_the_recipes_selection_is_trained_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe("fashion", ["selection.balance=1", "device=cpu", "threads=1"])
    given: dict[str, Any] = {}

    def distill(*networks: Any, **options: Any) -> None:
        given.update(options)
        raise Seen

    monkeypatch.setattr(students, "distill", distill)
    images = ArrayImages.__new__(ArrayImages)
    with pytest.raises(Seen):
        students.train_student(recipe, images, tmp_path, "digest", command="test")
    assert given["selection"] == recipe.selection and given["selection"].balance == 1
    assert given["kernel"] == recipe.kernel
