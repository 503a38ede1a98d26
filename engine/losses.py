"""Distillation losses: how far the student's answer is from the teacher's."""

from torch import Tensor
from torch.nn import functional


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), the batch's mean, as a float32 scalar.

    Hinton et al. 2015, section 2: the factor tau^2 keeps the gradient's size when tau changes. Both logits are
    [B,K] of any floating type; the teacher's are taken as constants.
    """
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
