import pytest
import torch
from torch import Tensor

from diffdfkd.kernels.batchnorm_loss import batchnorm_loss
from diffdfkd.kernels.class_statistics import class_batchnorm_loss

CLASSES = 5
FACTORS = torch.tensor([[0.5, 3.0], [2.0, 0.25]], dtype=torch.float64)


def drawn(samples: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Inputs of a layer with space and of one without, running means and variances, soft targets without class 3."""
    generator = torch.Generator().manual_seed(samples)
    inputs = [torch.randn(samples, *rest, generator=generator, dtype=torch.float64) + 0.3 for rest in ((3, 4, 5), (6,))]
    means = [torch.randn(c, generator=generator, dtype=torch.float64) for c in (3, 6)]
    variances = [torch.rand(c, generator=generator, dtype=torch.float64) + 0.2 for c in (3, 6)]
    labels = torch.tensor([0, 4, 1, 2, 0, 0, 1, 4, 2, 0])[:samples]
    targets = 0.8 * torch.nn.functional.one_hot(labels, CLASSES).double() + 0.2 / CLASSES
    return inputs, means, variances, targets


@pytest.mark.parametrize("factors", [None, FACTORS])
@pytest.mark.parametrize("samples", [1, 10])
def test_it_is_the_mean_of_each_classes_own_loss(samples: int, factors: Tensor | None) -> None:
    inputs, means, variances, targets = drawn(samples)
    weight = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 0, 1])[:samples]
    labels = targets.argmax(1)
    plain = [tensor.clone().requires_grad_() for tensor in inputs]
    each = []
    for label in range(CLASSES):
        own = (labels == label) & (weight > 0)
        if not own.any():
            continue
        terms = []
        for x, mean, variance in zip(plain, means, variances, strict=True):
            columns = x[own].transpose(0, 1).flatten(1)
            terms += [(columns.mean(1) - mean).norm(), (columns.var(1, unbiased=False) - variance).norm()]
        each.append(sum(a * b for a, b in zip([1.0] * 4 if factors is None else factors.flatten(), terms, strict=True)))
    expected = sum(each) / len(each)
    ours = [tensor.clone() for tensor in inputs]
    for tensor in ours:
        tensor[weight == 0] = float("nan")
        tensor.requires_grad_()
    loss = class_batchnorm_loss(ours, means, variances, weight, targets, factors)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, ours)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, plain), strict=True):
        torch.testing.assert_close(gradient[weight > 0], reference[weight > 0], rtol=1e-12, atol=1e-12)


def test_a_batch_of_one_class_has_the_loss_of_the_batch() -> None:
    inputs, means, variances, targets = drawn(10)
    same = targets[:1].expand_as(targets)
    loss = class_batchnorm_loss(inputs, means, variances, torch.ones(10), same)
    torch.testing.assert_close(loss, batchnorm_loss(inputs, means, variances, torch.ones(10)))
    assert not torch.allclose(class_batchnorm_loss(inputs, means, variances, torch.ones(10), targets), loss)


def test_without_samples_it_is_zero() -> None:
    inputs, means, variances, targets = drawn(10)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    loss = class_batchnorm_loss(leaves, means, variances, torch.zeros(10), targets)
    assert loss == 0 and not any(each.any() for each in torch.autograd.grad(loss, leaves))


def test_what_does_not_fit_is_refused() -> None:
    inputs, means, variances, targets = drawn(10)
    with pytest.raises(ValueError, match="means: of 1 layers"):
        class_batchnorm_loss(inputs, means[:1], variances, torch.ones(10), targets)
    with pytest.raises(ValueError, match=r"factors: got \(2,\)"):
        class_batchnorm_loss(inputs, means, variances, torch.ones(10), targets, torch.ones(2))
