"""``result.json``, the figures of a finished run: what stands in it, and whether what lies there is that."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from diffdfkd.engine.errors import UserError

Shares = dict[str, float]
Counts = dict[str, int]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Bin(_Row):
    """Of the confidences; confidence and accuracy are None where it is empty."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


class Exported(_Row):
    """``student.onnx`` and its parity with the network."""

    file: str
    bytes: int
    sha256: str
    runtime: str
    images: int
    max_abs: float
    max_rel: float
    tolerance: float


class NotExported(_Row):
    reason: str


class Distances(_Row):
    mean: float | None
    per_class: list[float | None]


class Doubles(_Row):
    count: int
    share: float | None
    examples: list[tuple[int, int]]


class SideBySide(_Row):
    guided: float | None
    unguided: float | None
    share: float | None


class BesideUnguided(_Row):
    """Recall and precision beside the prior's own samples."""

    recall: float
    precision: float
    unguided: float
    images: int
    intra_class_distance: SideBySide
    measure: str


class Selected(_Row):
    """Of the last round's images."""

    kept: int
    dropped: Counts
    effective_sample_size: float


class Diversity(_Row):
    intra_class_distance: Distances
    near_duplicates: Doubles
    images: int
    measure: str
    beside_unguided: BesideUnguided | None = None
    """None of an unguided run, of few images, and of runs older than the figure."""


class Result(_Row):
    """What every command that ends a run writes; what some of them add is not looked at."""

    student_accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    teacher_accuracy: float | None
    agreement: float | None
    calibration_error: float | None
    calibration: list[Bin] | None
    per_class: Shares | None
    per_class_images: Counts | None
    teacher_per_class: Shares | None
    test_images: int | None
    images: int
    dropped: int
    synthetic_per_class: Counts | None
    images_per_second: float | None
    synthesis_seconds: float
    distillation_seconds: float
    wall_seconds: float
    peak_memory_mib: float | None
    memory_kind: Literal["gpu_allocated", "rss"]
    device: str
    threads: int
    kernel: str = "reference"
    """Files older than the kernels do not say."""
    seed: int
    rounds: int
    distillation_steps: int
    selection: Selected | None = None
    """None where all images count alike, and of runs older than the field."""
    distillation_loss: float | None
    holdout_agreement: float | None
    versions: dict[str, str | None]
    student_sha256: str
    evaluation: dict[str, Any]
    alarms: list[dict[str, Any]]
    classes: list[str]
    confusion: list[list[int]] | None
    diversity: Diversity | None
    licences: dict[str, str | None]
    onnx: Exported | NotExported

    @model_validator(mode="after")
    def _of_one_evaluation(self) -> Self:
        """All figures of an evaluation or none, on the same classes."""
        figures = (
            *(self.student_accuracy, self.accuracy_interval, self.teacher_accuracy, self.agreement),
            *(self.calibration_error, self.calibration, self.test_images, self.confusion),
            *(self.per_class, self.per_class_images, self.teacher_per_class),
        )
        if any(figure is None for figure in figures) and any(figure is not None for figure in figures):
            raise ValueError("the figures of the evaluation are not complete")
        names = set(self.per_class or {})
        if not names == set(self.per_class_images or {}) == set(self.teacher_per_class or {}) <= set(self.classes):
            raise ValueError("the figures of the evaluation are of different classes")
        sides = {len(self.classes)}
        if self.confusion is not None and {len(self.confusion), *map(len, self.confusion)} != sides:
            raise ValueError("the confusion matrix is not one of the classes")
        return self


def read_result(file: Path) -> dict[str, Any]:
    """Content of ``result.json``; raises UserError where it is damaged, or lacks what a run writes today."""
    content = file.read_bytes()
    try:
        Result.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{field}: {first['msg']}" if field else first["msg"]
        raise UserError(
            f"{file}: damaged; give the command of the run again, which writes the file anew ({problem})"
        ) from None
    result: dict[str, Any] = json.loads(content)
    return result
