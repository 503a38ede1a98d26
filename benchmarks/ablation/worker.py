"""One job of an ablation, in a process of its own: ``python -m diffdfkd.benchmarks.ablation.worker FOLDER/job.json``.

A job makes a store of images, or one student and beside it ``row.json`` and ``predictions.npy``. Killed, it is
continued by the same command.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffdfkd.benchmarks.ablation import comparisons
from diffdfkd.benchmarks.ablation.axis import Source
from diffdfkd.benchmarks.ablation.evaluations import network_evaluations
from diffdfkd.benchmarks.ablation.plan import digest_of, shared_shards
from diffdfkd.benchmarks.conditions import commit
from diffdfkd.benchmarks.controls import save_predictions
from diffdfkd.benchmarks.shared_shards import take_shards
from diffdfkd.benchmarks.students import Trained, answers, kept_answers, train_student
from diffdfkd.engine.accounts import accounts
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.distill import own_shards
from diffdfkd.recipes.figures import load_student
from diffdfkd.recipes.run import open_test, run, shard_parts
from diffdfkd.recipes.run_folder import begun, claim, hold
from diffdfkd.recipes.synthesize import synthesize

JOB, ROW, PREDICTIONS = "job.json", "row.json", "predictions.npy"


@dataclass(frozen=True)
class Job:
    """What a process is told, by way of a file in the folder that it works in."""

    kind: Literal["store"] | Source
    recipe: dict[str, Any]
    """With ``output``, the folder."""
    content: dict[str, Any]
    """All that the row depends on, kept in ``row.json``."""
    store: str | None
    """Folder of the images, of a synthetic run."""


def write_job(job: Job) -> Path:
    file = Path(job.recipe["output"]) / JOB
    write_atomic(file, json.dumps(asdict(job)).encode())
    return file


def work(file: Path) -> None:
    """Do the job that the file describes; raises UserError as the commands do."""
    job = Job(**json.loads(file.read_text(encoding="utf-8")))
    recipe = load_recipe(job.recipe)
    if job.kind == "store":
        synthesize(recipe, progress=False)
        return
    if job.kind == "synthetic":
        assert job.store is not None
        row = synthetic_row(recipe, Path(job.store))
    else:
        row = comparison_row(recipe, job.kind)
    write_atomic(file.with_name(ROW), json.dumps({"row": row, "made_by": job.content}, indent=1).encode())


def synthetic_row(recipe: Recipe, store: Path) -> dict[str, Any]:
    """The student of the recipe's synthetic images: the store's as far as they are its own, the others made here."""
    made = begun(store)
    if made is None:
        raise UserError(f"{store}: holds no images; give the ablation's command again")
    shared = shared_shards(made, recipe)
    recipe = take_shards(recipe, store, shared)
    if recipe.rounds == 1 and len(shared) == len(shard_plan(recipe, 0)):
        with claim(recipe, prior=False) as folder:
            images, digest = own_shards(folder)
            trained = train_student(
                folder.recipe,
                images,
                folder.path,
                digest,
                parts=shard_parts(folder, 1),
                command="ablate",
                progress=False,
            )
            figures = _judged(folder.recipe, trained) | {"images": len(images)}
    else:
        figures = _whole_run(recipe, store)
    # Each journal knows the shards that were made beside it, over all sessions.
    rows = [
        row
        for row in read_journal(store / "metrics.jsonl")
        if row["event"] == "shard" and row["round"] == 0 and row["shard"] in shared
    ]
    own = accounts(read_journal(Path(recipe.output) / "metrics.jsonl"))
    seconds = accounts(rows).synthesis_seconds + own.synthesis_seconds
    return {
        **_rounded(recipe, figures),
        "sampling_steps": recipe.synthesis.steps,
        "images_per_second": round(figures["images"] / seconds, 2) if seconds else None,
        "synthesis_seconds": round(seconds, 1),
        "network_evaluations": network_evaluations(recipe),
        "engine": "/".join(dict.fromkeys((recipe.engine.unet, recipe.engine.chain))),
    }


def comparison_row(recipe: Recipe, source: str) -> dict[str, Any]:
    """The recipe's student on images that nobody synthesised: no synthesis is counted."""
    folder = Path(recipe.output)
    images = comparisons.comparison_images(recipe, source)
    with hold(folder):
        trained = train_student(
            recipe, images, folder, f"{source} {len(images)} {recipe.seed}", command="ablate", progress=False
        )
        figures = _judged(recipe, trained) | {"images": len(images)}
    return {
        **_rounded(recipe, figures),
        "sampling_steps": 0,
        "images_per_second": None,
        "synthesis_seconds": 0.0,
        "network_evaluations": 0,
        "engine": None,
    }


def _judged(recipe: Recipe, trained: Trained) -> dict[str, Any]:
    """The student's answers, kept as ``predictions.npy``, against the truth and the teacher's, which all runs share."""
    folder, batch = Path(recipe.output), recipe.evaluation.batch_size
    predicted, truth = answers(trained.student, trained.test, batch)
    np.save(folder / PREDICTIONS, predicted)
    asked = digest_of({"teacher": dump_recipe(recipe)["teacher"], "judged on": dump_recipe(recipe)["evaluation"]})
    teacher = kept_answers(folder.parent / f"teacher-{asked}.npy", trained.teacher, trained.test, batch)
    return {
        "student_accuracy": float((predicted == truth).mean()),
        "teacher_accuracy": float((teacher == truth).mean()),
        "agreement": float((predicted == teacher).mean()),
        "distillation_seconds": trained.seconds,
    }


def _whole_run(recipe: Recipe, store: Path) -> dict[str, Any]:
    """As ``diffdfkd run``: rounds of synthesis and distillation, or a last shard that is not the store's."""
    folder = Path(recipe.output)
    if not (folder / "preview").exists():
        shutil.copytree(store / "preview", folder / "preview")
    result = run(recipe, progress=False)
    test = open_test(recipe)
    assert test is not None
    student = load_student(folder / "student" / "student.safetensors", recipe)
    save_predictions(folder, student, test, result["student_accuracy"])
    return result


def _rounded(recipe: Recipe, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: round(figures[key], 4) for key in ("student_accuracy", "teacher_accuracy", "agreement")},
        "images": figures["images"],
        "steps": recipe.distillation.steps,
        "distillation_seconds": round(figures["distillation_seconds"], 1),
        "commit": commit(),
        "device": recipe.device,
        "threads": recipe.threads,
    }


def read_predictions(folder: Path) -> np.ndarray:
    """Predicted classes [N] of a finished run."""
    return np.asarray(np.load(folder / PREDICTIONS))


def main() -> None:
    try:
        work(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
