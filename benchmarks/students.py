"""A recipe's student trained on images of any source and judged on the real ones, without the rest of a run."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.accounts import accounts
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.distillation import distill
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import Images
from diffdfkd.engine.journal import Journal, read_journal
from diffdfkd.engine.logits import Part
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.figures import stage
from diffdfkd.recipes.run import load_classifiers, save_student, use_device


@dataclass(frozen=True)
class Trained:
    student: Classifier
    teacher: Classifier
    test: Images
    seconds: float
    """Of distillation, over all sessions."""


def train_student(
    recipe: Recipe,
    images: Images,
    folder: Path,
    digest: str,
    *,
    parts: Sequence[Part] | None = None,
    command: str,
    progress: bool = True,
) -> Trained:
    """Teacher, budget, augmentation, seed and device are the recipe's; goes on from checkpoints in ``folder``.

    ``digest`` stands for the images, whose kept teacher logits are in ``parts``; ``command`` is noted in the journal.
    Leaves ``student/student.safetensors``.
    """
    use_device(recipe)
    teacher, student, test = load_classifiers(recipe)
    assert test is not None
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "metrics.jsonl") as journal, stage(journal, "distillation", recipe):
        journal.log("session", command=command)
        summary = distill(
            student,
            teacher,
            images,
            recipe.distillation,
            folder / "student",
            seed=recipe.seed,
            data_digest=digest,
            parts=parts,
            selection=recipe.selection,
            journal=journal,
            device=recipe.device,
            kernel=recipe.kernel,
            progress=progress,
        )
        journal.log("distillation", images=len(images), **asdict(summary))
    save_student(student, folder / "student" / "student.safetensors", recipe)
    return Trained(student, teacher, test, accounts(read_journal(folder / "metrics.jsonl")).distillation_seconds)


@torch.inference_mode()
def answers(classifier: Classifier, images: Images, batch_size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes [N] int64, in eval mode on the classifier's device; UserError for NaN logits."""
    classifier.eval()
    device = next(classifier.parameters()).device
    predicted: list[Tensor] = []
    truth: list[Tensor] = []
    for first in range(0, len(images), batch_size):
        pixels, labels = images.read(range(first, min(first + batch_size, len(images))))
        logits = classifier(pixels.to(device).float() / 255)
        if not logits.isfinite().all():
            raise UserError("student: its logits are not finite; the weights are damaged, or training diverged")
        predicted.append(logits.argmax(1).cpu())
        truth.append(labels)
    return torch.cat(predicted).numpy(), torch.cat(truth).numpy()


def kept_answers(file: Path, teacher: Classifier, images: Images, batch_size: int) -> np.ndarray:
    """The teacher's predicted classes [N], asked once and kept in the file."""
    if file.is_file():
        return np.asarray(np.load(file))
    predicted, _ = answers(teacher, images, batch_size)
    content = io.BytesIO()
    np.save(content, predicted)
    write_atomic(file, content.getvalue())
    return predicted
