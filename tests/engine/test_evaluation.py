from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.evaluation import calibration_error, evaluate


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
    assert found.images == 5
    # Bins of confidence: 0.9 (right, wrong), 0.6 (right, wrong), 0.8 (wrong).
    assert found.calibration_error == pytest.approx((abs(1 - 1.8) + abs(1 - 1.2) + 0.8) / 5, abs=1e-6)
    assert student.training


def test_calibration_of_the_edges_of_the_bins() -> None:
    right, wrong = torch.tensor([True]), torch.tensor([False])
    assert calibration_error(torch.tensor([1.0]), right) == 0
    assert calibration_error(torch.tensor([1.0]), wrong) == 1
    # 0.2 = 3/15 belongs to the bin below that edge: it shares the bin of 0.19, not that of 0.21.
    edge = torch.tensor([0.2, 0.19])
    assert calibration_error(edge, torch.tensor([False, True])) == pytest.approx((1 - 0.39) / 2, abs=1e-6)
    edge = torch.tensor([0.2, 0.21])
    assert calibration_error(edge, torch.tensor([False, True])) == pytest.approx((0.2 + 0.79) / 2, abs=1e-6)


def test_without_a_teacher_there_is_no_agreement() -> None:
    found = evaluate(classifier(STUDENT), Held(LABELS), batch_size=2, device="cpu")
    assert found.agreement is None and found.teacher_accuracy is None


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
