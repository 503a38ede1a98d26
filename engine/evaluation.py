"""How good a student is on real labelled images: accuracy, agreement with the teacher, calibration, confusion."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import Images
from diffdfkd.engine.memory import fitting
from diffdfkd.engine.progress import progress_bar

BINS = 15
NORMAL_95 = 1.959963984540054
"""The standard normal's 97.5 % quantile."""


@dataclass(frozen=True)
class Evaluation:
    """All shares are fractions of 1."""

    accuracy: float
    accuracy_interval: list[float]
    """Low and high end of the accuracy's 95 % interval, which says what the number of test images leaves open."""
    per_class: dict[str, float]
    """Accuracy on each class's own images; classes without images are left out."""
    per_class_images: dict[str, int]
    """Test images of each class, of the same classes."""
    agreement: float | None
    """Share of images on which student and teacher name the same class."""
    calibration_error: float
    """Expected calibration error with 15 equal bins of confidence (Guo et al. 2017, equation 3)."""
    calibration: list[dict[str, Any]]
    """The bins in order: low and high edge, images, mean confidence and accuracy, both None in an empty bin."""
    confusion: list[list[int]]
    """Images of the row's true class that the student put into the column's class."""
    images: int
    teacher_accuracy: float | None
    teacher_per_class: dict[str, float] | None
    """The teacher's accuracy on the same classes."""


def wilson_interval(correct: int, count: int, quantile: float = NORMAL_95) -> list[float]:
    """Low and high end of a share's interval (Wilson 1927); 95 % by default, within [0, 1] however few there are."""
    share, spread = correct / count, quantile**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def calibration_bins(confidence: Tensor, correct: Tensor, bins: int = BINS) -> list[dict[str, Any]]:
    """Images, mean confidence and accuracy by bin of confidence; both [N], bin b holds (b/bins, (b+1)/bins]."""
    # In the confidences' own precision: 0.2 * 15 rounds to the edge 3, as it should.
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    images = torch.bincount(index, minlength=bins).tolist()
    zeros = torch.zeros(bins, dtype=torch.float64)
    sure = zeros.index_add(0, index, confidence.double()).tolist()
    right = zeros.index_add(0, index, correct.double()).tolist()
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "images": images[b],
            "confidence": sure[b] / images[b] if images[b] else None,
            "accuracy": right[b] / images[b] if images[b] else None,
        }
        for b in range(bins)
    ]


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean over images of |accuracy - confidence| of their bin."""
    filled = [row for row in bins if row["images"]]
    gaps = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in filled)
    return gaps / sum(row["images"] for row in filled)


@torch.no_grad()
def evaluate(
    student: Classifier,
    images: Images,
    *,
    teacher: Classifier | None = None,
    batch_size: int,
    device: torch.device | str,
    progress: bool = False,
) -> Evaluation:
    """The student, and the teacher where given, on all images in their order.

    Both are moved to `device` and judged in eval mode; a student in training is put back into train mode. Raises
    UserError for an image without a label or with one outside the student's classes, and for logits that are not
    finite.
    """
    if len(images) == 0:
        raise UserError("evaluation.images: no images to evaluate on")
    training = student.training
    student.to(device).eval()
    if teacher is not None:
        teacher.to(device).eval()
    count = len(student.classes)
    confusion = torch.zeros(count * count, dtype=torch.int64)
    confidences, corrects = [], []
    agreed = 0
    teacher_right = torch.zeros(count, dtype=torch.int64)
    bar = progress_bar(len(images), "evaluation", unit="images", shown=progress)
    try:
        for start in range(0, len(images), batch_size):
            pixels, labels = images.read(range(start, min(start + batch_size, len(images))))
            _check_labels(labels, start, count)
            with fitting("evaluation.batch_size", f"a batch of {len(labels):,} images", "give a smaller one"):
                batch = pixels.to(device).float() / 255
                confidence, predicted = _predict(student, batch, "student")
                judged = None if teacher is None else _predict(teacher, batch, "teacher")[1]
            confusion += torch.bincount(labels * count + predicted, minlength=count * count)
            confidences.append(confidence)
            corrects.append(predicted == labels)
            if judged is not None:
                agreed += int((judged == predicted).sum())
                teacher_right += torch.bincount(labels[judged == labels], minlength=count)
            bar.update(len(labels))
    finally:
        bar.close()
        student.train(training)
    table = confusion.view(count, count)
    totals = table.sum(1).tolist()
    present = {name: index for index, name in enumerate(student.classes) if totals[index]}
    correct = torch.cat(corrects)
    bins = calibration_bins(torch.cat(confidences), correct)
    right = int(correct.sum())
    return Evaluation(
        accuracy=right / len(images),
        accuracy_interval=wilson_interval(right, len(images)),
        per_class={name: int(table[index, index]) / totals[index] for name, index in present.items()},
        per_class_images={name: totals[index] for name, index in present.items()},
        agreement=None if teacher is None else agreed / len(images),
        calibration_error=calibration_error(bins),
        calibration=bins,
        confusion=table.tolist(),
        images=len(images),
        teacher_accuracy=None if teacher is None else int(teacher_right.sum()) / len(images),
        teacher_per_class=None
        if teacher is None
        else {name: int(teacher_right[index]) / totals[index] for name, index in present.items()},
    )


def _predict(classifier: Classifier, batch: Tensor, field: str) -> tuple[Tensor, Tensor]:
    """(largest probability [B], its class [B]) on the CPU."""
    logits = classifier(batch).float()
    if not logits.isfinite().all():
        raise UserError(f"{field}: its logits are not finite; the weights are damaged, or training diverged")
    confidence, predicted = logits.softmax(1).max(1)
    return confidence.cpu(), predicted.cpu()


def _check_labels(labels: Tensor, start: int, count: int) -> None:
    wrong = ((labels < 0) | (labels >= count)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        label = int(labels[first])
        state = "has no label" if label < 0 else f"has label {label}"
        raise UserError(f"evaluation.images: image {start + first} {state}; labels 0 to {count - 1} are needed")
