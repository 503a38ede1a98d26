"""The tables of an ablation: a row for each run, and each variant against its axis's reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffdfkd.benchmarks.ablation.axis import Axis
from diffdfkd.benchmarks.ablation.jobs import run_folder
from diffdfkd.benchmarks.ablation.plan import Run
from diffdfkd.benchmarks.ablation.worker import read_predictions
from diffdfkd.benchmarks.statistics import Paired, paired

COLUMNS = (
    *("axis", "variant", "seed", "images", "steps", "sampling_steps"),
    *("student_accuracy", "teacher_accuracy", "agreement"),
    *("images_per_second", "synthesis_seconds", "distillation_seconds", "network_evaluations"),
    *("judged_on", "commit", "engine", "device", "threads", "run"),
)


@dataclass(frozen=True)
class Cell:
    """Runs of one variant at one budget, in the order of their seeds."""

    axis: str
    variant: str
    images: int | None
    """None for fresh draws, which no budget of images bounds."""
    steps: int
    runs: tuple[Run, ...]
    rows: tuple[dict[str, Any], ...]

    def values(self, column: str) -> np.ndarray:
        """[seeds] float64."""
        return np.array([row[column] for row in self.rows], dtype=float)

    @property
    def accuracy(self) -> np.ndarray:
        """[seeds], in per cent."""
        return 100 * self.values("student_accuracy")

    @property
    def seconds(self) -> np.ndarray:
        """[seeds], of synthesis and distillation; a store's share of the first is counted for each run that uses it."""
        return self.values("synthesis_seconds") + self.values("distillation_seconds")

    @property
    def evaluations(self) -> np.ndarray:
        """[seeds], of networks for all images."""
        return self.values("network_evaluations") * self.values("images")


def run_rows(runs: Sequence[Run], rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each run of each axis, columns as in ``COLUMNS``."""
    table = []
    for run in runs:
        known = {"axis": run.axis, "variant": run.variant, "seed": run.seed, "run": run.digest}
        row = {**rows[run.digest], **known, "judged_on": judged_on(run)}
        table.append({column: row[column] for column in COLUMNS})
    return table


def judged_on(run: Run) -> str:
    """The real images' file or folder, by its name."""
    return Path(str(run.recipe.evaluation.images)).name


def make_cells(runs: Sequence[Run], rows: Mapping[str, dict[str, Any]]) -> list[Cell]:
    """Runs that differ in their seed alone, in the order of their first."""
    groups: dict[tuple[str, str, int | None, int], list[Run]] = {}
    for run in runs:
        images = None if run.source == "floor" else run.images
        groups.setdefault((run.axis, run.variant, images, run.recipe.distillation.steps), []).append(run)
    return [
        Cell(*key, tuple(members), tuple(rows[member.digest] for member in members)) for key, members in groups.items()
    ]


def compare(cells: Sequence[Cell], axes: Sequence[Axis], output: Path, labels: np.ndarray) -> list[dict[str, Any]]:
    """Each variant minus its axis's reference at the same images and steps; fresh draws at every number of images."""
    table = []
    for axis in axes:
        own = [cell for cell in cells if cell.axis == axis.name]
        references = [cell for cell in own if cell.variant == axis.reference]
        for cell in own:
            for reference in references:
                apart = None not in (cell.images, reference.images) and cell.images != reference.images
                if cell.variant == axis.reference or cell.steps != reference.steps or apart:
                    continue
                found = paired(*(_correct(each, output, labels) for each in (cell, reference)))
                images = reference.images if cell.images is None else cell.images
                table.append(
                    {"axis": axis.name, "variant": cell.variant, "reference": axis.reference}
                    | {"images": images, "steps": cell.steps}
                    | _columns(found)
                )
    return table


def _columns(found: Paired) -> dict[str, Any]:
    return {
        "seeds": found.seeds,
        "points": round(found.points, 2),
        **{
            f"bootstrap95_{end}": round(value, 2) for end, value in zip(("low", "high"), found.bootstrap95, strict=True)
        },
        **{f"t95_{end}": _given(value) for end, value in zip(("low", "high"), found.t95, strict=True)},
        "only_variant": found.only_first,
        "only_reference": found.only_second,
        "mcnemar_p": float(f"{found.p:.3g}"),
        "mcnemar_p_by_seed": " ".join(f"{p:.3g}" for p in found.p_by_seed),
    }


def _given(value: float) -> float | None:
    """Of one seed there is none."""
    return None if math.isnan(value) else round(value, 2)


def resolved(row: Mapping[str, Any]) -> bool:
    """Whether zero lies outside of both intervals, the bootstrap's over seeds and images and Student's over seeds.

    With few seeds the first is about the range of their differences, so that it alone says too much.
    """
    return row["seeds"] > 1 and not any(
        row[f"{kind}_low"] <= 0 <= row[f"{kind}_high"] for kind in ("bootstrap95", "t95")
    )


def _correct(cell: Cell, output: Path, labels: np.ndarray) -> np.ndarray:
    """[seeds, images], true where the student is right."""
    return np.stack([read_predictions(run_folder(output, run)) == labels for run in cell.runs])
