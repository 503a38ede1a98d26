import pytest
import torch
from torch.nn import functional

from diffdfkd.engine.inversion import class_loss
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss
from diffdfkd.kernels.kd_loss import adversarial_loss
from diffdfkd.kernels.moments import batch_moments

NAN = float("nan")


def published_batchnorm_loss(inputs, means, variances):
    """The formula as published, for a batch in which every sample counts."""
    total = torch.zeros((), dtype=inputs[0].dtype)
    for activation, mean, variance in zip(inputs, means, variances, strict=True):
        columns = activation.transpose(0, 1).reshape(activation.shape[1], -1)
        total = total + (columns.mean(1) - mean).norm() + (columns.var(1, unbiased=False) - variance).norm()
    return total


def layers(batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((batch, 3, 5, 7), (batch, 4))]
    return (
        draw,
        [torch.full((3,), 0.2, dtype=dtype), torch.zeros(4, dtype=dtype)],
        [torch.ones(3).to(dtype)] * 1 + [torch.full((4,), 0.5, dtype=dtype)],
    )


@pytest.mark.parametrize("batch", [1, 2, 63])
def test_batchnorm_loss_and_gradient_are_the_published_formula(batch):
    inputs, means, variances = layers(batch)
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    plain = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = batchnorm_loss(ours, means, variances, torch.ones(batch))
    expected = published_batchnorm_loss(plain, means, variances)
    torch.testing.assert_close(loss, expected)
    for gradient, reference in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, plain), strict=True):
        torch.testing.assert_close(gradient, reference)


def test_batchnorm_loss_counts_samples_of_weight_one_only():
    inputs, means, variances = layers(6)
    weight = torch.tensor([1, 0, 1, 1, 0, 1])
    kept = [tensor[weight > 0].clone().requires_grad_() for tensor in inputs]
    expected = published_batchnorm_loss(kept, means, variances)
    poisoned = [tensor.clone() for tensor in inputs]
    for tensor in poisoned:
        tensor[weight == 0] = NAN
        tensor.requires_grad_()
    loss = batchnorm_loss(poisoned, means, variances, weight)
    torch.testing.assert_close(loss, expected)
    for gradient, reference in zip(
        torch.autograd.grad(loss, poisoned), torch.autograd.grad(expected, kept), strict=True
    ):
        torch.testing.assert_close(gradient[weight > 0], reference)


def test_batchnorm_loss_vanishes_at_the_running_statistics_with_a_finite_gradient():
    activation = torch.randn(8, 3, 4, 4, dtype=torch.float64).requires_grad_()
    columns = activation.detach().transpose(0, 1).reshape(3, -1)
    loss = batchnorm_loss([activation], [columns.mean(1)], [columns.var(1, unbiased=False)], torch.ones(8))
    assert loss.item() < 1e-12
    (gradient,) = torch.autograd.grad(loss, activation)
    assert gradient.isfinite().all()


def test_batchnorm_loss_of_no_sample_is_zero():
    activation = torch.full((2, 3, 4, 4), NAN)
    assert batchnorm_loss([activation], [torch.ones(3)], [torch.ones(3)], torch.zeros(2)) == 0


def test_variance_does_not_cancel_at_a_large_mean():
    noise = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    activation = 1e3 + 1e-2 * noise
    mean, variance = batch_moments(activation, torch.ones(64))
    columns = activation.double().transpose(0, 1).reshape(2, -1)
    torch.testing.assert_close(variance.double(), columns.var(1, unbiased=False), rtol=1e-2, atol=0)
    torch.testing.assert_close(mean.double(), columns.mean(1), rtol=1e-6, atol=0)


def test_moments_of_half_precision_are_float32():
    mean, variance = batch_moments(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16), torch.ones(4))
    assert mean.dtype == variance.dtype == torch.float32


def test_class_loss_is_soft_cross_entropy_over_the_counted_samples():
    logits = torch.randn(5, 4, dtype=torch.float64)
    targets = torch.randn(5, 4, dtype=torch.float64).softmax(1)
    weight = torch.tensor([True, True, False, True, False])
    expected = functional.cross_entropy(logits[weight], targets[weight])
    poisoned = logits.clone()
    poisoned[~weight] = NAN
    poisoned.requires_grad_()
    loss = class_loss(poisoned, targets, weight)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, poisoned)
    assert gradient[weight].isfinite().all() and gradient[weight].abs().sum() > 0


def test_adversarial_loss_is_minus_the_divergence_where_both_agree():
    teacher = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.1]], dtype=torch.float64)
    divergences = [
        functional.kl_div(student[row].log_softmax(0), teacher[row].softmax(0), reduction="sum") for row in (0, 2)
    ]
    loss = adversarial_loss(student, teacher, torch.ones(3))
    torch.testing.assert_close(loss, -sum(divergences) / 3)
    assert loss < 0


def test_adversarial_loss_reaches_the_student_alone():
    teacher = torch.randn(4, 3).requires_grad_()
    student = (teacher.detach() * 0.5).requires_grad_()
    loss = adversarial_loss(student, teacher, torch.ones(4))
    by_teacher, by_student = torch.autograd.grad(loss, [teacher, student], allow_unused=True)
    assert by_teacher is None and by_student.abs().sum() > 0
