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

from diffdfkd.benchmarks.ablation.axis import Source
from diffdfkd.benchmarks.ablation.evaluations import network_evaluations
from diffdfkd.benchmarks.ablation.plan import shared_shards
from diffdfkd.benchmarks.shared_shards import take_shards
from diffdfkd.engine.accounts import accounts
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.run_folder import begun, hold

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
        from diffdfkd.recipes.synthesize import synthesize

        synthesize(recipe, progress=False)
        return
    if job.kind == "synthetic":
        assert job.store is not None
        row = synthetic_row(recipe, Path(job.store))
    else:
        row = comparison_row(recipe, job.kind)
    write_atomic(file.with_name(ROW), json.dumps({"row": row, "made_by": job.content}, indent=1).encode())


def synthetic_row(recipe: Recipe, store: Path) -> dict[str, Any]:
    """The recipe as ``diffdfkd run`` runs it, on the store's images as far as they are its own."""
    from diffdfkd.recipes.distill import distill
    from diffdfkd.recipes.run import run

    made = begun(store)
    if made is None:
        raise UserError(f"{store}: holds no images; give the ablation's command again")
    shared = shared_shards(made, recipe)
    recipe = take_shards(recipe, store, shared)
    folder = Path(recipe.output)
    if recipe.rounds == 1 and len(shared) == len(shard_plan(recipe, 0)):
        result = distill(recipe, progress=False)
        assert result is not None
    else:
        if not (folder / "preview").exists():
            shutil.copytree(store / "preview", folder / "preview")
        result = run(recipe, progress=False)
    # Of a store that is made on after a kill, and of this run's own shards, each journal knows its own.
    rows = [
        row
        for row in read_journal(store / "metrics.jsonl")
        if row["event"] == "shard" and row["round"] == 0 and row["shard"] in shared
    ]
    seconds = accounts(rows).synthesis_seconds + (result["synthesis_seconds"] or 0.0)
    _save_predictions(folder, recipe, result["student_accuracy"])
    return {
        **_figures(recipe, result),
        "images": result["images"],
        "sampling_steps": recipe.synthesis.steps,
        "images_per_second": round(result["images"] / seconds, 2) if seconds else None,
        "synthesis_seconds": round(seconds, 1),
        "network_evaluations": network_evaluations(recipe),
        "engine": "/".join(dict.fromkeys((recipe.engine.unet, recipe.engine.chain))),
    }


def comparison_row(recipe: Recipe, source: str) -> dict[str, Any]:
    """The recipe's student on images that nobody synthesised: no synthesis is counted."""
    from diffdfkd.benchmarks.ablation.comparisons import comparison_images
    from diffdfkd.benchmarks.controls import train_on

    folder = Path(recipe.output)
    with hold(folder):
        result = train_on(comparison_images(recipe, source), recipe, folder)
    return {
        **_figures(recipe, {**result, "distillation_seconds": result["seconds"]}),
        "images": result["images"],
        "sampling_steps": 0,
        "images_per_second": None,
        "synthesis_seconds": 0.0,
        "network_evaluations": 0,
        "engine": None,
    }


def _figures(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    from diffdfkd.benchmarks.conditions import commit

    return {
        **{key: round(result[key], 4) for key in ("student_accuracy", "teacher_accuracy", "agreement")},
        "steps": recipe.distillation.steps,
        "distillation_seconds": round(result["distillation_seconds"], 1),
        "commit": commit(),
        "device": recipe.device,
        "threads": recipe.threads,
    }


def _save_predictions(folder: Path, recipe: Recipe, accuracy: float) -> None:
    from diffdfkd.benchmarks.controls import save_predictions
    from diffdfkd.recipes.figures import load_student
    from diffdfkd.recipes.run import open_test

    test = open_test(recipe)
    assert test is not None
    save_predictions(folder, load_student(folder / "student" / "student.safetensors", recipe), test, accuracy)


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
