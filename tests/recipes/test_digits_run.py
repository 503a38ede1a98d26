"""The recipe `digits` from prior to student, in small."""

from pathlib import Path

import pytest

from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.run import run

SMALL = (
    *("synthesis.images_per_class=30", "synthesis.steps=8", "distillation.steps=150", "distillation.batch_size=64"),
    *("engine=eager", "threads=1", "device=cpu"),
    "student.initialization=random",  # the teacher's weights would pass the test before any training
)


@pytest.mark.slow
def test_digits_from_prior_to_student(tmp_path: Path) -> None:
    result = run(load_recipe("digits", [f"output={tmp_path / 'run'}", *SMALL]))
    assert result["images"] == 300
    assert result["teacher_accuracy"] > 0.98
    assert result["student_accuracy"] > 0.5, "a guess is 0.1"
    assert (tmp_path / "run" / "report.html").is_file()
