"""Controls of the Fashion demo: guided and unguided synthesis, the source-only floor and the oracle, paired by seed.

    python -m diffdfkd.benchmarks.controls --output runs/controls --seeds 0 1 2

Writes ``benchmarks/results/controls-fashion.csv`` (one row a run) and ``controls-fashion-paired.csv`` (differences
with intervals). A run that is already under ``--output`` is not repeated. Needs the Fashion-MNIST training files for
the oracle alone (``--fashion``), which no other part of the demo reads.
"""

import argparse
import csv
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.classifier import Classifier, build_classifier, load_weights
from diffdfkd.engine.distillation import distill
from diffdfkd.engine.evaluation import evaluate
from diffdfkd.engine.images import Images, open_images
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.render_icons import Glyphs, augment, load_glyphs
from diffdfkd.recipes.run import run
from diffdfkd.recipes.train_teacher import fashion_split, training_files

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("guided", "unguided", "floor", "oracle")
BUDGETS: dict[str, list[str]] = {
    "small": ["synthesis.images_per_class=120", "distillation.steps=500", "distillation.batch_size=128"],
    "default": [],
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass
class FreshIcons:
    """The prior's own training images: a new augmentation of a class-balanced icon at every index."""

    glyphs: Glyphs
    length: int
    seed: int
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        labels = self.glyphs.classes
        self._by_class = [torch.nonzero(labels == label).flatten() for label in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 images [n, 1, 32, 32] and classes [n]; a function of the seed and the indices."""
        key = hashlib.sha256(np.asarray([self.seed, *indices], dtype=np.int64).tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        labels = torch.tensor([int(index) % len(self._by_class) for index in indices])
        rows = torch.stack(
            [
                members[torch.randint(len(members), (), generator=generator)]
                for members in (self._by_class[int(label)] for label in labels)
            ]
        )
        images = augment(self.glyphs.select(rows), generator)
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


def predictions(classifier: Classifier, images: Images, batch_size: int = 500) -> Tensor:
    """Predicted classes [N], int64."""
    with torch.inference_mode():
        parts = [
            classifier(images.read(range(first, min(first + batch_size, len(images))))[0].float() / 255).argmax(1)
            for first in range(0, len(images), batch_size)
        ]
    return torch.cat(parts)


def train_on(images: Images, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe's student distilled on other images: same teacher, budget, augmentation and seed."""
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    student = build_classifier(recipe.student, recipe.teacher, field="student", seed=recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "metrics.jsonl")
    started = time.perf_counter()
    distill(
        student,
        teacher,
        images,
        recipe.distillation,
        folder / "student",
        seed=recipe.seed,
        data_digest=folder.name,
        journal=journal,
        device=torch.device("cpu"),
    )
    seconds = time.perf_counter() - started
    test = open_images(str(recipe.evaluation.images), recipe.evaluation.labels, channels=recipe.teacher.channels)
    result = evaluate(student, test, teacher=teacher, batch_size=recipe.evaluation.batch_size, device="cpu")
    np.save(folder / "predictions.npy", predictions(student, test).numpy())
    return {
        "student_accuracy": result.accuracy,
        "teacher_accuracy": result.teacher_accuracy,
        "images": len(images),
        "seconds": seconds,
    }


def run_synthesis(recipe: Recipe, shared: Path | None) -> dict[str, Any]:
    """The recipe as ``diffdfkd run`` runs it; shards that a larger run of the same choices made are taken from it."""
    output = Path(recipe.output)
    synthesis_seconds = None
    if shared is not None and not (output / "synthetic").exists():
        needed = -(-recipe.synthesis.images_per_class * len(recipe.teacher.classes) // recipe.synthesis.batch_size)
        target = output / "synthetic" / "round-000"
        target.mkdir(parents=True)
        events = [json.loads(line) for line in (shared / "metrics.jsonl").read_text().splitlines()]
        made = {event["shard"]: event["seconds"] for event in events if event["event"] == "shard"}
        synthesis_seconds = sum(made[index] for index in range(needed))
        for index in range(needed):
            for suffix in (".tar", ".json"):
                name = f"shard-{index:05d}{suffix}"
                shutil.copyfile(shared / "synthetic" / "round-000" / name, target / name)
    result = run(recipe)
    student = build_classifier(recipe.student, recipe.teacher, field="student", seed=recipe.seed)
    load_weights(student.model, output / "student" / "student.safetensors", field="student")
    student.eval()
    test = open_images(str(recipe.evaluation.images), recipe.evaluation.labels, channels=recipe.teacher.channels)
    np.save(output / "predictions.npy", predictions(student, test).numpy())
    seconds = result["distillation_seconds"] + (synthesis_seconds or result["synthesis_seconds"])
    return {
        "student_accuracy": result["student_accuracy"],
        "teacher_accuracy": result["teacher_accuracy"],
        "images": result["images"],
        "seconds": seconds,
    }


def one(variant: str, budget: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table, made or read back."""
    folder = arguments.output / f"{variant}-{budget}-{seed}"
    row_file = folder / "row.json"
    if row_file.is_file():
        return json.loads(row_file.read_text())
    overrides = [*BUDGETS[budget], f"seed={seed}", f"output={folder}", *arguments.override]
    if variant == "unguided":
        overrides.append("guidance.mode=none")
    recipe = load_recipe(arguments.recipe, overrides)
    total = recipe.synthesis.images_per_class * len(recipe.teacher.classes)
    if variant in ("guided", "unguided"):
        larger = arguments.output / f"{variant}-default-{seed}"
        values = run_synthesis(recipe, larger if budget == "small" and larger.is_dir() else None)
    elif variant == "floor":
        # As many as are drawn, so that no augmentation is seen twice.
        drawn = recipe.distillation.steps * recipe.distillation.batch_size
        values = train_on(FreshIcons(load_glyphs(), drawn, seed), recipe, folder)
    else:
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
    write_atomic(row_file, json.dumps(row).encode())
    return row


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t over seeds."""
    half = T_95[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
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
    """Guided minus each other variant, paired by seed and test image."""
    recipe = load_recipe(arguments.recipe)
    test = open_images(str(recipe.evaluation.images), recipe.evaluation.labels)
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
            low, high = t_interval(differences.mean(axis=1)) if len(seeds) > 1 else (float("nan"), float("nan"))
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
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


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
    rows = []
    # The larger budget first: the smaller one takes its shards.
    for seed in arguments.seeds:
        for variant in arguments.variants:
            for budget in ("default", "small"):
                rows.append(one(variant, budget, seed, arguments))
                print(rows[-1], flush=True)
    rows.sort(key=lambda row: (list(BUDGETS).index(row["budget"]), VARIANTS.index(row["variant"]), row["seed"]))
    write_csv(arguments.results / "controls-fashion.csv", rows)
    if set(arguments.variants) == set(VARIANTS):
        table = paired(rows, arguments)
        write_csv(arguments.results / "controls-fashion-paired.csv", table)
        for row in table:
            print(row)


if __name__ == "__main__":
    main()
