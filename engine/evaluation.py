"""How good a student is on real labelled images: accuracy, agreement with the teacher, calibration, confusion."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import Images

BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """All shares are fractions of 1."""

    accuracy: float
    per_class: dict[str, float]
    """Accuracy on each class's own images; classes without images are left out."""
    agreement: float | None
    """Share of images on which student and teacher name the same class."""
    calibration_error: float
    """Expected calibration error with 15 equal bins of confidence (Guo et al. 2017, equation 3)."""
    confusion: list[list[int]]
    """Images of the row's true class that the student put into the column's class."""
    images: int
    teacher_accuracy: float | None


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Mean over images of |accuracy - confidence| of their bin; both [N], bin b holds (b/bins, (b+1)/bins]."""
    # In the confidences' own precision: 0.2 * 15 rounds to the edge 3, as it should.
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct.double() - confidence.double())
    return float(gap.abs().sum() / len(confidence))


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
    agreed = teacher_right = 0
    try:
        for start in tqdm(range(0, len(images), batch_size), "evaluating", unit="batch", disable=not progress):
            pixels, labels = images.read(range(start, min(start + batch_size, len(images))))
            _check_labels(labels, start, count)
            batch = pixels.to(device).float() / 255
            confidence, predicted = _predict(student, batch, "student")
            confusion += torch.bincount(labels * count + predicted, minlength=count * count)
            confidences.append(confidence)
            corrects.append(predicted == labels)
            if teacher is not None:
                _, judged = _predict(teacher, batch, "teacher")
                agreed += int((judged == predicted).sum())
                teacher_right += int((judged == labels).sum())
    finally:
        student.train(training)
    table = confusion.view(count, count)
    totals = table.sum(1)
    correct = torch.cat(corrects)
    return Evaluation(
        accuracy=int(correct.sum()) / len(images),
        per_class={
            name: int(table[index, index]) / int(totals[index])
            for index, name in enumerate(student.classes)
            if totals[index]
        },
        agreement=None if teacher is None else agreed / len(images),
        calibration_error=calibration_error(torch.cat(confidences), correct),
        confusion=table.tolist(),
        images=len(images),
        teacher_accuracy=None if teacher is None else teacher_right / len(images),
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
