"""Controls of the Fashion demo: guided and unguided synthesis, the source-only floor and the oracle, paired by seed.

    python -m diffdfkd.benchmarks.controls --output runs/controls --seeds 0 1 2

Writes ``benchmarks/results/controls-fashion.csv`` (one row a run) and ``controls-fashion-paired.csv`` (differences
with intervals). A run that is already under ``--output`` is not repeated. Needs the Fashion-MNIST training files for
the oracle alone (``--fashion``), which no other part of the demo reads.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdfkd.benchmarks.shared_shards import take_shards
from diffdfkd.benchmarks.statistics import paired
from diffdfkd.benchmarks.students import answers, train_student
from diffdfkd.benchmarks.tables import write_csv
from diffdfkd.engine.classifier import Classifier, Preprocessing, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.evaluation import evaluate
from diffdfkd.engine.images import Images, open_images
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.figures import load_student
from diffdfkd.recipes.launch import settle_machine
from diffdfkd.recipes.render_icons import Glyphs, augment, load_glyphs
from diffdfkd.recipes.run import open_test, run
from diffdfkd.recipes.train_teacher import fashion_split, training_files

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("guided", "unguided", "floor", "oracle")
BUDGETS: dict[str, list[str]] = {
    "small": ["synthesis.images_per_class=120", "distillation.steps=500", "distillation.batch_size=128"],
    "default": [],
}


@dataclass
class FreshIcons:
    """The prior's own training images of the teacher's classes, balanced: a new augmentation at every index."""

    glyphs: Glyphs
    length: int
    seed: int
    preprocessing: Preprocessing
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        labels = self.glyphs.classes
        self._by_class = [torch.nonzero(labels == label).flatten() for label in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 images [n, 1, size, size] and classes [n]; a function of the seed and the indices.

        Resized to the teacher's input before the student's augmentation, as synthetic images are.
        """
        key = hashlib.sha256(np.asarray([self.seed, *indices], dtype=np.int64).tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        labels = torch.tensor([int(index) % len(self._by_class) for index in indices])
        rows = torch.stack(
            [
                members[torch.randint(len(members), (), generator=generator)]
                for members in (self._by_class[int(label)] for label in labels)
            ]
        )
        images = self.preprocessing.fit(augment(self.glyphs.select(rows), generator)).clamp(0, 1)
        return (images * 255).round().to(torch.uint8), labels


@dataclass
class Subset:
    """Some images of another source."""

    source: Images
    indices: Sequence[int]
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.source.read([self.indices[index] for index in indices])


def real_images(folder: Path | None, count: int, seed: int) -> Subset:
    """``count`` of the teacher's own training images, drawn by seed, never from its validation split."""
    source = open_images(*training_files(folder))
    _, labels = source.read(range(len(source)))
    train, _ = fashion_split(labels.numpy())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(source, [int(train[index]) for index in order])


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
        # As many as are drawn, so that no augmentation is seen twice.
        drawn = recipe.distillation.steps * recipe.distillation.batch_size
        teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
        values = train_on(FreshIcons(load_glyphs(), drawn, seed, teacher.preprocessing), recipe, folder)
    else:
        total = recipe.synthesis.images_per_class * len(recipe.teacher.classes)
        values = train_on(real_images(arguments.fashion, total, seed), recipe, folder)
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
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's training files; Debian's by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    arguments = parser.parse_args()
    try:
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
    write_csv(arguments.results / "controls-fashion.csv", rows)
    table = differences(rows, arguments)
    write_csv(arguments.results / "controls-fashion-paired.csv", table)
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
