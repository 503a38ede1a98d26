import pytest
import torch
from torch.nn import functional

from diffdfkd.engine.losses import kd_loss


@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
def test_kd_loss_and_its_gradient_follow_the_definition(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    p, q = (teacher / temperature).softmax(1), (student.detach() / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()

    loss = kd_loss(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(loss, student)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)  # float32 cancels at a high tau
    # d/ds of tau^2 KL is tau (q - p), divided by the batch.
    torch.testing.assert_close(gradient, temperature * (q - p) / 7, rtol=1e-4, atol=1e-6)


def test_high_temperature_keeps_the_size_of_the_gradient() -> None:
    student = torch.tensor([[1.0, -1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, -2.0]])
    norms = [torch.autograd.grad(kd_loss(student, teacher, tau), student)[0].norm() for tau in (20.0, 40.0)]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.1, atol=0)


def test_equal_logits_give_zero_and_the_teacher_gets_no_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    assert kd_loss(logits, logits, 4.0).item() == pytest.approx(0, abs=1e-6)
    student = torch.randn(4, 3, requires_grad=True)
    kd_loss(student, logits, 2.0).backward()
    assert logits.grad is None and student.grad is not None


def test_loss_of_bfloat16_logits_is_taken_in_float32() -> None:
    student, teacher = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    log_q = functional.log_softmax(student.float(), 1)
    expected = functional.kl_div(log_q, teacher.float().softmax(1), reduction="batchmean")
    torch.testing.assert_close(kd_loss(student, teacher, 1.0), expected)
