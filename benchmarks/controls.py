"""Controls of a shipped recipe: guided and unguided synthesis, the source-only floor and the oracle, paired by seed.

    python -m diffdfkd.benchmarks.controls --output runs/controls --seeds 0 1 2
    python -m diffdfkd.benchmarks.controls --recipe digits --output runs/controls-digits --seeds 0 1 2

Writes ``benchmarks/results/controls-RECIPE.csv`` (one row a run) and ``controls-RECIPE-paired.csv`` (differences with
intervals). A run that is already under ``--output`` is not repeated. Needs the teacher's training data for the oracle
alone (``--data``), which no other part of a run reads.
"""

import argparse
import csv
import io
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdfkd.benchmarks.control_images import floor_images, oracle_images, setting
from diffdfkd.engine.accounts import accounts
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.distillation import distill
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.evaluation import evaluate
from diffdfkd.engine.images import Images
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.engine.shards import round_folder, shard_path, write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.figures import load_student, stage
from diffdfkd.recipes.launch import settle_machine
from diffdfkd.recipes.run import load_classifiers, open_test, run, use_device

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("guided", "unguided", "floor", "oracle")
BUDGETS: dict[str, list[str]] = {
    "small": ["synthesis.images_per_class=120", "distillation.steps=500", "distillation.batch_size=128"],
    "default": [],
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def save_predictions(folder: Path, student: Classifier, test: Images, accuracy: float) -> None:
    """Predicted classes [N] as ``predictions.npy``, which must give the accuracy that the evaluation gave."""
    student.eval()
    parts, labels = [], []
    with torch.inference_mode():
        for first in range(0, len(test), 500):
            pixels, truth = test.read(range(first, min(first + 500, len(test))))
            parts.append(student(pixels.float() / 255).argmax(1))
            labels.append(truth)
    predicted = torch.cat(parts)
    found = (predicted == torch.cat(labels)).double().mean().item()
    # Batches of another size may turn a tie.
    if abs(found - accuracy) > 2e-4:
        raise RuntimeError(f"{folder}: predictions give an accuracy of {found}, the evaluation gave {accuracy}")
    np.save(folder / "predictions.npy", predicted.numpy())


def train_on(images: Images, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe's student distilled on other images: same teacher, budget, augmentation, seed and device."""
    use_device(recipe)
    teacher, student, test = load_classifiers(recipe)
    assert test is not None
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "metrics.jsonl") as journal, stage(journal, "distillation", recipe):
        journal.log("session", command="controls")
        summary = distill(
            student,
            teacher,
            images,
            recipe.distillation,
            folder / "student",
            seed=recipe.seed,
            data_digest=f"{type(images).__name__} {len(images)} {recipe.seed}",
            journal=journal,
            device=recipe.device,
        )
        journal.log("distillation", images=len(images), **asdict(summary))
    result = evaluate(student, test, teacher=teacher, batch_size=recipe.evaluation.batch_size, device=recipe.device)
    save_predictions(folder, student, test, result.accuracy)
    return {
        "student_accuracy": result.accuracy,
        "teacher_accuracy": result.teacher_accuracy,
        "images": len(images),
        "seconds": accounts(read_journal(folder / "metrics.jsonl")).distillation_seconds,
    }


def run_synthesis(recipe: Recipe, shared: Path | None) -> dict[str, Any]:
    """The recipe as ``diffdfkd run`` runs it; shards that a larger run of the same choices made are taken from it.

    A shard is a function of the recipe's choices alone, which the run checks: the copies are what it would make.
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
        source, target = (round_folder(root / "synthetic", 0) for root in (shared, output))
        target.mkdir(parents=True, exist_ok=True)
        for shard in plan:
            for path in (shard_path(source, shard.index), shard_path(source, shard.index).with_suffix(".json")):
                if not (target / path.name).exists():
                    shutil.copyfile(path, target / path.name)
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


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t over seeds; NaN from one seed or more than ten."""
    quantile = T_95.get(len(values) - 1, float("nan"))
    half = quantile * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap_interval(differences: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of [seeds, images], resampling seeds and, within them, test images."""
    generator = np.random.default_rng(0)
    seeds, images = differences.shape
    means = np.empty(draws)
    for draw in range(draws):
        chosen = differences[generator.integers(seeds, size=seeds)]
        means[draw] = chosen[:, generator.integers(images, size=images)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
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
                ).astype(float)
                for variant in ("guided", other)
            }
            differences = 100 * (correct["guided"] - correct[other])
            low, high = t_interval(differences.mean(axis=1))
            boot_low, boot_high = bootstrap_interval(differences)
            values = {
                "points": differences.mean(),
                "t95_low": low,
                "t95_high": high,
                "bootstrap95_low": boot_low,
                "bootstrap95_high": boot_high,
            }
            table.append(
                {"budget": budget, "difference": f"guided - {other}", "seeds": len(seeds)}
                | {key: round(float(value), 2) for key, value in values.items()}
            )
    return table


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


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
    table = paired(rows, arguments)
    write_csv(arguments.results / f"controls-{name}-paired.csv", table)
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
