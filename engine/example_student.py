"""A student to prove the chain on: one that names the teacher's classes, less surely, so that its term acts.

L_adv (kernels/kd_loss.py) is 0, with its gradient, where student and teacher name different classes, as a fresh
student does nearly everywhere, and where both answer alike. An engine that lost the term would pass on either.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.stage_networks import student_weights

IMAGES = 16
"""That it is fitted to."""
SPREAD = 1.0
"""Standard deviation of its logits from image to image, so that its answers hang on the image."""
LEAD = 1.0
"""By which the mean logit of the teacher's most frequent class is above the others'."""

log = logging.getLogger(__name__)


@torch.no_grad()
def acting_weights(
    student: Classifier, teacher: Classifier, decode: Callable[[Tensor], Tensor], latents: Tensor
) -> tuple[Tensor, ...]:
    """Weights of the student, in the order of `student_weights`, float32, the same on every call.

    They are its own but for the last layer, which is scaled and shifted until the student names the class that the
    teacher names most often on the images that ``latents`` [B, c, h, w] decode to.
    """
    images = decode(latents[:IMAGES]).float()
    wanted = teacher(images).argmax(1)
    prepared = student.preprocessing(images)
    weights = dict(student_weights(student))
    classes = len(teacher.classes)

    def answers() -> Tensor:
        made: Tensor = functional_call(student.model, weights, (prepared,))
        return made.float()

    last = [name for name, _ in student.model.named_parameters() if len(weights[name]) == classes]
    kernel = next((name for name in reversed(last) if weights[name].dim() > 1), None)
    bias = next((name for name in reversed(last) if weights[name].dim() == 1), None)
    if kernel is not None and len(images) > 1:
        spread = answers().std(0).mean()
        weights[kernel] = weights[kernel] * (SPREAD / spread.clamp(min=1e-6))
    if bias is not None:
        lead = LEAD * torch.nn.functional.one_hot(wanted.mode().values, classes)
        weights[bias] = weights[bias] - answers().mean(0) + lead
    if not (answers().argmax(1) == wanted).any():
        log.warning("chain: no student was found whose term acts; engines are compared where it is 0")
    return tuple(weights.values())
