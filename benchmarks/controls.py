"""Controls of a shipped recipe: guided and unguided synthesis, the source-only floor and the oracle, paired by seed.

    python -m diffdfkd.benchmarks.controls --output runs/controls --seeds 0 1 2
    python -m diffdfkd.benchmarks.controls --recipe digits --output runs/controls-digits --seeds 0 1 2

Writes ``benchmarks/results/controls-RECIPE.csv`` (one row a run) and ``controls-RECIPE-paired.csv`` (differences with
intervals). A run that is already under ``--output`` is not repeated. Needs the teacher's training data for the oracle
alone (``--data``), which no other part of a run reads.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffdfkd.benchmarks.control_images import floor_images, oracle_images, setting
from diffdfkd.benchmarks.shared_shards import take_shards
from diffdfkd.benchmarks.statistics import paired
from diffdfkd.benchmarks.students import answers, train_student
from diffdfkd.benchmarks.tables import write_csv
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.evaluation import evaluate
from diffdfkd.engine.images import Images
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.figures import load_student
from diffdfkd.recipes.launch import settle_machine
from diffdfkd.recipes.run import open_test, run

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("guided", "unguided", "floor", "oracle")
BUDGETS: dict[str, list[str]] = {
    "small": ["synthesis.images_per_class=120", "distillation.steps=500", "distillation.batch_size=128"],
    "default": [],
}


def save_predictions(folder: Path, student: Classifier, test: Images, accuracy: float) -> None:
    """Predicted classes [N] as ``predictions.npy``, which must give the accuracy that the evaluation gave."""
    predicted, truth = answers(student, test)
    found = float((predicted == truth).mean())
    # Batches of another size may turn a tie.
    if abs(found - accuracy) > 2e-4:
        raise RuntimeError(f"{folder}: predictions give an accuracy of {found}, the evaluation gave {accuracy}")
    np.save(folder / "predictions.npy", predicted)


def train_on(images: Images, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe's student distilled on other images: same teacher, budget, augmentation, seed and device."""
    digest = f"{type(images).__name__} {len(images)} {recipe.seed}"
    made = train_student(recipe, images, folder, digest, command="controls")
    result = evaluate(
        made.student,
        made.test,
        teacher=made.teacher,
        batch_size=recipe.evaluation.batch_size,
        device=recipe.device,
    )
    save_predictions(folder, made.student, made.test, result.accuracy)
    return {
        "student_accuracy": result.accuracy,
        "teacher_accuracy": result.teacher_accuracy,
        "images": len(images),
        "seconds": made.seconds,
    }


def run_synthesis(recipe: Recipe, shared: Path | None) -> dict[str, Any]:
    """The recipe as ``diffdfkd run`` runs it; shards that a larger run of the same choices made are taken from it.

    A shard is a function of the recipe's choices alone, which the run checks.
    """
    output = Path(recipe.output)
    reused = 0.0
    if shared is not None:
        plan = shard_plan(recipe, 0)
        made = {
            event["shard"]: event["seconds"]
            for event in read_journal(shared / "metrics.jsonl")
            if event["event"] == "shard"
        }
        reused = sum(made[shard.index] for shard in plan)
        recipe = take_shards(recipe, shared, [shard.index for shard in plan])
    result = run(recipe)
    student, test = load_student(output / "student" / "student.safetensors", recipe), open_test(recipe)
    assert test is not None
    save_predictions(output, student, test, result["student_accuracy"])
    return {
        "student_accuracy": result["student_accuracy"],
        "teacher_accuracy": result["teacher_accuracy"],
        "images": result["images"],
        "seconds": result["distillation_seconds"] + (reused or result["synthesis_seconds"]),
    }


def one(variant: str, budget: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table, made or read back. Raises UserError where the folder holds a row of another recipe."""
    folder = arguments.output / f"{variant}-{budget}-{seed}"
    overrides = [*BUDGETS[budget], f"seed={seed}", f"output={folder}", *arguments.override]
    if variant == "unguided":
        overrides.append("guidance.mode=none")
    recipe = settle_machine(load_recipe(arguments.recipe, overrides))
    if recipe.rounds > 1:
        raise UserError(f"rounds: got {recipe.rounds}; the controls compare runs of one round")
    row_file = folder / "row.json"
    if row_file.is_file():
        held = json.loads(row_file.read_text())
        if held["recipe"] != dump_recipe(recipe):
            raise UserError(f"{row_file}: made by another recipe; choose another --output, or delete the folder")
        return held["row"]
    if variant in ("guided", "unguided"):
        larger = arguments.output / f"{variant}-default-{seed}"
        values = run_synthesis(recipe, larger if budget == "small" and (larger / "row.json").is_file() else None)
    elif variant == "floor":
        values = train_on(floor_images(recipe), recipe, folder)
    else:
        values = train_on(oracle_images(recipe, arguments.data), recipe, folder)
    row = {
        "variant": variant,
        "budget": budget,
        "seed": seed,
        **{key: round(values[key], 4) for key in ("student_accuracy", "teacher_accuracy")},
        "images": values["images"],
        "steps": recipe.synthesis.steps if variant in ("guided", "unguided") else 0,
        "distillation_steps": recipe.distillation.steps,
        "seconds": round(values["seconds"], 1),
    }
    write_atomic(row_file, json.dumps({"row": row, "recipe": dump_recipe(recipe)}).encode())
    return row


def differences(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Guided minus each other variant, paired by seed and test image, in points of accuracy."""
    test = open_test(load_recipe(arguments.recipe))
    assert test is not None
    _, labels = test.read(range(len(test)))
    table = []
    for budget in BUDGETS:
        for other in VARIANTS[1:]:
            seeds = [row["seed"] for row in rows if row["variant"] == other and row["budget"] == budget]
            correct = {
                variant: np.stack(
                    [
                        np.load(arguments.output / f"{variant}-{budget}-{seed}" / "predictions.npy") == labels.numpy()
                        for seed in seeds
                    ]
                )
                for variant in ("guided", other)
            }
            found = paired(correct["guided"], correct[other])
            values = {
                "points": found.points,
                "t95_low": found.t95[0],
                "t95_high": found.t95[1],
                "bootstrap95_low": found.bootstrap95[0],
                "bootstrap95_high": found.bootstrap95[1],
            }
            table.append(
                {"budget": budget, "difference": f"guided - {other}", "seeds": len(seeds)}
                | {key: round(value, 2) for key, value in values.items()}
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/controls"), help="folder of the runs")
    parser.add_argument("--recipe", default="fashion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--data", type=Path, help="the teacher's training data, as train_teacher --data takes it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    arguments = parser.parse_args()
    try:
        name = setting(load_recipe(arguments.recipe))
        rows = []
        # The larger budget first: the smaller one takes its shards.
        for seed in arguments.seeds:
            for variant in arguments.variants:
                for budget in ("default", "small"):
                    rows.append(one(variant, budget, seed, arguments))
                    print(rows[-1], flush=True)
    except UserError as error:
        sys.exit(complain(str(error)))
    if set(arguments.variants) != set(VARIANTS):
        return  # the tables are written when all variants are asked for; what is made is not made again
    rows.sort(key=lambda row: (list(BUDGETS).index(row["budget"]), VARIANTS.index(row["variant"]), row["seed"]))
    write_csv(arguments.results / f"controls-{name}.csv", rows)
    table = differences(rows, arguments)
    write_csv(arguments.results / f"controls-{name}-paired.csv", table)
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
