"""A student file alone on real images.

diffdfkd evaluate fashion --student runs/fashion/student/student.safetensors --json figures.json
"""

import json
from pathlib import Path
from typing import Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.command import refuse_json


def evaluate(
    recipe: Recipe,
    student: Path,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    json_file: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy, per class and calibration of a student file, and beside the teacher where the recipe has its weights.

    ``images`` is a folder with one sub-folder a class or an IDX file, by default the recipe's test images. The figures
    are returned, and written to ``json_file``. Nothing of a run is touched. Raises UserError for unreadable input.
    """
    from dataclasses import asdict

    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.evaluation import evaluate as judge
    from diffdfkd.engine.shards import write_atomic
    from diffdfkd.recipes.figures import load_student
    from diffdfkd.recipes.launch import settle_machine
    from diffdfkd.recipes.run import open_test, use_device

    refuse_json(json_file)
    if images is not None or labels is not None:
        given = {
            "images": str(images) if images else recipe.evaluation.images,
            "labels": str(labels) if labels else None,
        }
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=given)})
    recipe = settle_machine(recipe.model_copy(update={"kernel": "auto"}))  # it is of no use here
    use_device(recipe)
    test = open_test(
        recipe,
        "--images" if images else "evaluation.images",
        "--labels" if labels else "evaluation.labels",
    )
    if test is None:
        raise UserError("evaluation.images: the recipe names no test images; give --images FOLDER_OR_IDX")
    if student.is_dir():
        inside = student / "student" / "student.safetensors"
        hint = f"its student is {inside}" if inside.is_file() else "give the file of the student's weights"
        raise UserError(f"--student: {student} is a folder; {hint}")
    try:
        model = load_student(student, recipe)
    except UserError as error:
        message = str(error)
        if message.startswith("student.weights: "):
            message = "--student: " + message.removeprefix("student.weights: ")
        raise UserError(f"{message}{_made_for(student)}") from error
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher") if recipe.teacher.weights else None
    figures = asdict(
        judge(
            model,
            test,
            teacher=teacher,
            batch_size=recipe.evaluation.batch_size,
            device=recipe.device,
            progress=progress,
        )
    )
    if json_file is not None:
        try:
            write_atomic(json_file, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
        except OSError as error:
            raise UserError(f"--json: {json_file} cannot be written ({error.strerror}); choose another file") from None
    return figures


def _made_for(student: Path) -> str:
    """What a run says in the header of its student's file, to be compared with the recipe; empty of other files."""
    from diffdfkd.engine.model_card import described
    from diffdfkd.engine.student_file import read_header

    try:
        header = read_header(student)
    except UserError:
        return ""
    network = described(header["architecture"], header["options"])
    channels, classes = header.get("channels"), len(header["classes"])
    return f"; the file says that it is a {network} of {channels} channel(s) and {classes} classes"


def summary(figures: dict[str, Any]) -> str:
    """The figures in a few lines for a person."""
    low, high = figures["accuracy_interval"]
    lines = [
        f"accuracy  {figures['accuracy']:.2%} of {figures['images']:,} images, 95 % interval {low:.2%} to {high:.2%}"
    ]
    lines += [f"  {share:7.2%}  {name}" for name, share in figures["per_class"].items()]
    lines.append(f"calibration error {figures['calibration_error']:.3f}")
    if figures["teacher_accuracy"] is not None:
        lines.append(f"teacher   {figures['teacher_accuracy']:.2%}, agreement {figures['agreement']:.2%}")
    return "\n".join(lines)
