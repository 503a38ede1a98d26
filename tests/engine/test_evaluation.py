from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.evaluation import calibration_bins, calibration_error, evaluate, wilson_interval


class Held:
    """Images whose first pixel is their number."""

    classes: list[str] | None = None

    def __init__(self, labels: list[int]) -> None:
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(list(indices))
        return chosen.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), self.labels[chosen]


class Table(nn.Module):
    """Answers image number n with row n of a table of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def classifier(probabilities: list[list[float]]) -> Classifier:
    preprocessing = Preprocessing(channels=1, size=8, mean=(0.0,), std=(1.0,), interpolation="bilinear")
    return Classifier(Table(torch.tensor(probabilities).log()), preprocessing, ["a", "b", "c"])


STUDENT = [[0.9, 0.05, 0.05], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.08, 0.02, 0.9]]
TEACHER = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]
LABELS = [0, 1, 1, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_evaluation_by_hand(batch_size: int) -> None:
    student = classifier(STUDENT).train()
    found = evaluate(student, Held(LABELS), teacher=classifier(TEACHER), batch_size=batch_size, device="cpu")
    assert found.accuracy == 2 / 5
    assert found.per_class == {"a": 1 / 3, "b": 1 / 2}
    assert found.confusion == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert found.agreement == 2 / 5
    assert found.teacher_accuracy == 4 / 5
    assert found.teacher_per_class == {"a": 2 / 3, "b": 1.0}
    assert found.per_class_images == {"a": 3, "b": 2}
    assert found.images == 5
    assert found.accuracy_interval == wilson_interval(2, 5)
    # Bins of confidence: 0.9 (right, wrong), 0.6 (right, wrong), 0.8 (wrong).
    assert found.calibration_error == pytest.approx((abs(1 - 1.8) + abs(1 - 1.2) + 0.8) / 5, abs=1e-6)
    assert student.training


def error_of(confidences: list[float], correct: list[bool]) -> float:
    return calibration_error(calibration_bins(torch.tensor(confidences), torch.tensor(correct)))


def test_calibration_of_the_edges_of_the_bins() -> None:
    assert error_of([1.0], [True]) == 0
    assert error_of([1.0], [False]) == 1
    # 0.2 = 3/15 belongs to the bin below that edge: it shares the bin of 0.19, not that of 0.21.
    assert error_of([0.2, 0.19], [False, True]) == pytest.approx((1 - 0.39) / 2, abs=1e-6)
    assert error_of([0.2, 0.21], [False, True]) == pytest.approx((0.2 + 0.79) / 2, abs=1e-6)


def test_bins_say_how_many_how_sure_and_how_right() -> None:
    bins = calibration_bins(torch.tensor([0.95, 0.99, 0.5]), torch.tensor([True, False, True]))
    assert [row["images"] for row in bins] == [0] * 7 + [1] + [0] * 6 + [2]
    assert bins[-1]["confidence"] == pytest.approx(0.97) and bins[-1]["accuracy"] == 0.5
    assert bins[0] == {"low": 0.0, "high": 1 / 15, "images": 0, "confidence": None, "accuracy": None}


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    # Wilson without continuity correction: Newcombe 1998, table I, lines 1 to 4, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_against_published_ones(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx([low, high], abs=5e-5)
    assert wilson_interval(count - correct, count) == pytest.approx([1 - high, 1 - low], abs=5e-5)


def test_without_a_teacher_there_is_no_agreement() -> None:
    found = evaluate(classifier(STUDENT), Held(LABELS), batch_size=2, device="cpu")
    assert found.agreement is found.teacher_accuracy is found.teacher_per_class is None


@pytest.mark.parametrize(("label", "message"), [(3, "image 3 has label 3"), (-1, "image 3 has no label")])
def test_labels_outside_the_classes_are_refused(label: int, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}; labels 0 to 2"):
        evaluate(classifier(STUDENT), Held([0, 1, 1, label, 0]), batch_size=2, device="cpu")


def test_logits_that_are_not_finite_are_refused() -> None:
    broken = classifier([[float("nan")] * 3] * 5)
    with pytest.raises(UserError, match="student: its logits are not finite"):
        evaluate(broken, Held(LABELS), batch_size=2, device="cpu")


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        evaluate(classifier(STUDENT), Held([]), batch_size=2, device="cpu")
