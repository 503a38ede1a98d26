from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from kernels_tolerances import DTYPES, TOLERANCES
from torch import Tensor
from vast import vast

from diffdfkd.kernels import activation as tiles
from diffdfkd.kernels.batchnorm_loss import Distance, batchnorm_distance, batchnorm_loss, gradient_launch, held_loss
from diffdfkd.kernels.launch import Launch
from diffdfkd.kernels.moments import Moments, accumulate_moments

pytestmark = pytest.mark.usefixtures("poisoned")

KERNELS = ("reference", "triton")
Form = Literal["reference", "triton"]
NAN = float("nan")
SHAPES = [(3, 1, 3, 63), (2, 5, 127), (2, 3, 4, 5, 7), (1, 4, 6, 8), (5, 70)]


def laid_out(activation: Tensor, channels_last: bool) -> Tensor:
    return activation.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else activation.contiguous()


def draw(*shapes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs of layers, and running means and variances at some distance from their moments."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) + 0.5 for shape in shapes]
    means = [torch.randn(shape[1], generator=generator) for shape in shapes]
    variances = [2 * torch.rand(shape[1], generator=generator) + 0.1 for shape in shapes]
    return inputs, means, variances


def published_loss(
    inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor], weight: Tensor
) -> Tensor:
    """The formula as published, in float64, of the samples of weight 1 alone."""
    total = torch.zeros((), dtype=torch.float64)
    for activation, mean, variance in zip(inputs, means, variances, strict=True):
        columns = activation[weight > 0].double().transpose(0, 1).flatten(1)
        total = total + (columns.mean(1) - mean.double()).norm()
        total = total + (columns.var(1, unbiased=False) - variance.double()).norm()
    return total


def expected_gradients(inputs: Sequence[Tensor], *rest: Any, scale: float) -> tuple[Tensor, list[Tensor]]:
    leaves = [activation.double().requires_grad_() for activation in inputs]
    loss = published_loss(leaves, *rest)
    return loss.detach(), list(torch.autograd.grad(scale * loss, leaves))


def elements(inputs: Sequence[Tensor], weight: Tensor) -> float:
    """Most of a channel that count: times this, a gradient is of the size of 1 and its errors show in every dtype."""
    return float((weight > 0).sum() * max(activation[0, 0].numel() for activation in inputs))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_loss_and_gradient_of_a_layer(
    kernel: Form, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    inputs, means, variances = draw(shape)
    leaf = laid_out(inputs[0], channels_last).to(dtype).requires_grad_()
    weight = torch.ones(shape[0])
    scale = elements([leaf], weight)
    expected, (expected_gradient,) = expected_gradients([leaf.detach()], means, variances, weight, scale=scale)
    loss = batchnorm_loss([leaf], means, variances, weight, kernel=kernel)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.detach().double(), expected, **TOLERANCES[torch.float32])
    (gradient,) = torch.autograd.grad(scale * loss, leaf)
    assert gradient.dtype == dtype and gradient.stride() == leaf.stride()
    assert expected_gradient.abs().mean() > 0.1
    torch.testing.assert_close(gradient.double(), expected_gradient, **TOLERANCES[dtype])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_several_layers(kernel: Form, channels_last: bool) -> None:
    shapes = [(3, 4, 5, 7), (3, 33, 2, 3), (3, 1, 9), (3, 6)]
    inputs, means, variances = draw(*shapes)
    weight = torch.ones(3)
    leaves = [laid_out(activation, channels_last).requires_grad_() for activation in inputs]
    scale = elements(inputs, weight)
    expected, expected_each = expected_gradients(inputs, means, variances, weight, scale=scale)
    loss = batchnorm_loss(leaves, means, variances, weight, kernel=kernel)
    torch.testing.assert_close(loss.detach().double(), expected, **TOLERANCES[torch.float32])
    for gradient, theirs in zip(torch.autograd.grad(scale * loss, leaves), expected_each, strict=True):
        torch.testing.assert_close(gradient.double(), theirs, rtol=2e-5, atol=2e-5)


FACTORS = torch.tensor([[0.5, 3.0], [2.0, 0.25], [0.0, 1.5]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_count_by_their_factors(kernel: Form) -> None:
    inputs, means, variances = draw((3, 4, 5, 7), (3, 33, 2, 3), (3, 6))
    weight = torch.tensor([1, 0, 1])
    scale = elements(inputs, weight)
    leaves = [activation.double().requires_grad_() for activation in inputs]
    expected = torch.zeros((), dtype=torch.float64)
    for leaf, mean, variance, (of_mean, of_variance) in zip(leaves, means, variances, FACTORS.tolist(), strict=True):
        columns = leaf[weight > 0].transpose(0, 1).flatten(1)
        expected = expected + of_mean * (columns.mean(1) - mean).norm()
        expected = expected + of_variance * (columns.var(1, unbiased=False) - variance).norm()
    theirs = torch.autograd.grad(scale * expected, leaves)
    ours = [activation.clone().requires_grad_() for activation in inputs]
    loss = batchnorm_loss(ours, means, variances, weight, FACTORS, kernel=kernel)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **TOLERANCES[torch.float32])
    for gradient, wanted in zip(torch.autograd.grad(scale * loss, ours), theirs, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-5, atol=2e-5)
    loss, total, gradients = in_micro_batches(inputs, means, variances, weight, [1, 2], kernel, scale, FACTORS)
    torch.testing.assert_close(loss.double(), expected.detach(), **TOLERANCES[torch.float32])
    torch.testing.assert_close(total, loss)
    for gradient, wanted in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("shape", "channels_last"), [((2, 3, 20, 90), False), ((2, 70, 3, 11), True)])
def test_samples_of_several_tiles(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], channels_last: bool) -> None:
    for name, value in {"TILE": 512, "PROGRAMS": 1, "MOST_CHUNKS": 2}.items():
        monkeypatch.setattr(tiles, name, value)
    inputs, means, variances = draw(shape)
    leaf, weight = laid_out(inputs[0], channels_last).requires_grad_(), torch.ones(2)
    scale = elements(inputs, weight)
    _, (expected,) = expected_gradients(inputs, means, variances, weight, scale=scale)
    loss = batchnorm_loss([leaf], means, variances, weight, kernel="triton")
    (gradient,) = torch.autograd.grad(scale * loss, leaf)
    torch.testing.assert_close(gradient.double(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_of_weight_zero_count_nowhere(kernel: Form, dtype: torch.dtype) -> None:
    inputs, means, variances = draw((6, 3, 5, 4), (6, 7))
    weight = torch.tensor([1, 0, 1, 1, 0, 1])
    for activation in inputs:
        activation[weight == 0] = NAN
    leaves = [activation.clone().requires_grad_() for activation in inputs]
    scale = elements(inputs, weight)
    expected, expected_each = expected_gradients(inputs, means, variances, weight, scale=scale)
    loss = batchnorm_loss(leaves, means, variances, weight.to(dtype), kernel=kernel)
    torch.testing.assert_close(loss.detach().double(), expected, **TOLERANCES[torch.float32])
    for gradient, theirs in zip(torch.autograd.grad(scale * loss, leaves), expected_each, strict=True):
        kept = weight > 0
        torch.testing.assert_close(gradient[kept].double(), theirs[kept], rtol=2e-5, atol=2e-5)
        if kernel == "triton":
            assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))


@pytest.mark.parametrize("content", [0.5, NAN])
def test_no_sample_gives_loss_and_gradient_zero(content: float) -> None:
    leaf = torch.full((2, 3, 4), content).requires_grad_()
    loss = batchnorm_loss([leaf], [torch.ones(3)], [torch.ones(3)], torch.zeros(2), kernel="triton")
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))
    assert batchnorm_loss([leaf], [torch.ones(3)], [torch.ones(3)], torch.zeros(2), kernel="reference") == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_derivative_of_a_distance_of_zero_is_zero(kernel: Form) -> None:
    leaf = torch.tensor([[0.25, 0.75]] * 2)[:, None].repeat(1, 3, 1).requires_grad_()
    half, sixteenth = torch.full((3,), 0.5), torch.full((3,), 0.0625)
    loss = batchnorm_loss([leaf], [half], [sixteenth], torch.ones(2), kernel=kernel)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kernel", KERNELS)
def test_running_statistics_of_half_precision(kernel: Form) -> None:
    inputs, means, variances = draw((3, 4, 5, 7))
    means, variances = [means[0].half()], [variances[0].half()]
    leaf, weight = inputs[0].requires_grad_(), torch.ones(3)
    expected, (expected_gradient,) = expected_gradients(inputs, means, variances, weight, scale=105)
    loss = batchnorm_loss([leaf], means, variances, weight, kernel=kernel)
    torch.testing.assert_close(loss.detach().double(), expected, **TOLERANCES[torch.float32])
    (gradient,) = torch.autograd.grad(105 * loss, leaf)
    torch.testing.assert_close(gradient.double(), expected_gradient, **TOLERANCES[torch.float32])


def test_only_the_inputs_that_need_a_gradient_get_one() -> None:
    inputs, means, variances = draw((2, 3, 4), (2, 5), (2, 3, 4))
    inputs[1].requires_grad_()
    loss = batchnorm_loss(inputs, means, variances, torch.ones(2), kernel="triton")
    loss.backward()
    assert [activation.grad is not None for activation in inputs] == [False, True, False]
    with torch.no_grad():
        assert not batchnorm_loss(inputs, means, variances, torch.ones(2), kernel="triton").requires_grad


def test_it_is_differentiated_once() -> None:
    inputs, means, variances = draw((2, 3, 4))
    leaf, factor = inputs[0].requires_grad_(), torch.ones(()).requires_grad_()
    loss = factor * batchnorm_loss([leaf], means, variances, torch.ones(2), kernel="triton")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def in_micro_batches(
    inputs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    weight: Tensor,
    sizes: list[int],
    kernel: Form,
    scale: float = 1.0,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """L_bn, the sum of the micro-batches' parts, and the gradients, in two passes over micro-batches of these sizes."""
    parts = list(zip(*(activation.split(sizes) for activation in inputs), strict=True))
    moments = None
    for part, own in zip(parts, weight.split(sizes), strict=True):
        moments = accumulate_moments(part, own, moments, kernel=kernel)
    assert moments is not None
    distance = batchnorm_distance(moments, means, variances, factors)
    total, gradients = torch.zeros(()), []
    for part, own in zip(parts, weight.split(sizes), strict=True):
        leaves = [activation.detach().requires_grad_() for activation in part]
        loss = held_loss(leaves, own, moments, distance, kernel=kernel)
        gradients.append(torch.autograd.grad(scale * loss, leaves))
        total = total + loss.detach()
    return distance.loss, total, [torch.cat(each) for each in zip(*gradients, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_micro_batches_give_the_gradient_of_one_large_batch(kernel: Form) -> None:
    inputs, means, variances = draw((9, 3, 4, 5), (9, 20), (9, 2, 11))
    # Samples and parts differ, or a part's own moments would do.
    inputs = [activation + torch.linspace(0, 3, 9).view(-1, *[1] * (activation.dim() - 1)) for activation in inputs]
    weight = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0])
    scale = elements(inputs, weight)
    expected, expected_each = expected_gradients(inputs, means, variances, weight, scale=scale)
    loss, total, gradients = in_micro_batches(inputs, means, variances, weight, [2, 4, 1, 2], kernel, scale)
    torch.testing.assert_close(loss.double(), expected, **TOLERANCES[torch.float32])
    torch.testing.assert_close(total.double(), expected, **TOLERANCES[torch.float32])
    for gradient, theirs in zip(gradients, expected_each, strict=True):
        torch.testing.assert_close(gradient.double(), theirs, rtol=2e-5, atol=2e-5)


def test_micro_batches_of_the_reference_in_float64_are_exact() -> None:
    inputs, means, variances = ([tensor.double() for tensor in each] for each in draw((9, 3, 4, 5), (9, 20)))
    weight = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0])
    expected, expected_each = expected_gradients(inputs, means, variances, weight, scale=1)
    loss, _, gradients = in_micro_batches(inputs, means, variances, weight, [2, 4, 1, 2], "reference")
    torch.testing.assert_close(loss, expected)
    for gradient, theirs in zip(gradients, expected_each, strict=True):
        torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_micro_batches_of_which_none_counts(kernel: Form) -> None:
    inputs, means, variances = draw((3, 4, 5))
    loss, total, (gradient,) = in_micro_batches(inputs, means, variances, torch.zeros(3), [1, 2], kernel)
    assert loss == 0 and total == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_a_held_distance_stays_without_a_graph() -> None:
    inputs, means, variances = draw((3, 4, 5))
    moments = accumulate_moments(inputs, torch.ones(3), kernel="triton")
    distance = batchnorm_distance(moments, means, variances)
    held_loss([inputs[0].requires_grad_()], torch.ones(3), moments, distance, kernel="triton").backward()
    assert not any(t.requires_grad for t in (distance.loss, *distance.by_mean, *moments.means))


def test_bad_arguments() -> None:
    inputs, means, variances = draw((3, 4, 5), (3, 2, 6))
    weight = torch.ones(3)
    bad = torch.ones(3)
    with pytest.raises(ValueError, match="inputs: none"):
        batchnorm_loss([], [], [], weight)
    with pytest.raises(ValueError, match="means: of 1 layers, the inputs of 2"):
        batchnorm_loss(inputs, means[:1], variances, weight)
    with pytest.raises(ValueError, match=r"means\[1\]: got shape \(3,\); \(2,\) expected"):
        batchnorm_loss(inputs, [means[0], bad], variances, weight)
    with pytest.raises(ValueError, match=r"variances\[0\]: got shape \(3,\); \(4,\) expected"):
        batchnorm_loss(inputs, means, [bad, variances[1]], weight)
    with pytest.raises(ValueError, match=r"variances\[1\]: on meta"):
        batchnorm_loss(inputs, means, [variances[0], variances[1].to("meta")], weight)
    with pytest.raises(ValueError, match=r"factors: got \(2,\) on cpu; \[2, 2\] on cpu"):
        batchnorm_loss(inputs, means, variances, weight, torch.ones(2))
    with pytest.raises(ValueError, match=r"weight: .*inputs\[0\]"):
        batchnorm_loss(inputs, means, variances, torch.ones(4))
    with pytest.raises(ValueError, match=r"weight: .*inputs\[1\]"):
        batchnorm_loss([inputs[0], inputs[1][:2]], means, variances, weight)
    with pytest.raises(ValueError, match=r"inputs\[1\]: torch.float64"):
        batchnorm_loss([inputs[0], inputs[1].double()], means, variances, weight, kernel="triton")
    with pytest.raises(ValueError, match=r"inputs\[1\]: strides"):
        batchnorm_loss([inputs[0], inputs[1][..., ::2]], means, variances, weight, kernel="triton")
    moments = accumulate_moments(inputs, weight)
    with pytest.raises(ValueError, match=r"means\[1\]: got shape \(3,\)"):
        batchnorm_distance(moments, [means[0], bad], variances)
    distance = batchnorm_distance(moments, means, variances)
    with pytest.raises(ValueError, match="means: of 1 layers"):
        held_loss(inputs, weight, Moments(moments.samples, means[:1], variances), distance)
    with pytest.raises(ValueError, match=r"by_variance\[0\]: got shape \(3,\)"):
        held_loss(inputs, weight, moments, Distance(distance.loss, means, [bad, bad]))


def described(activation: Tensor) -> tuple[Launch, Tensor]:
    vector = torch.ones(activation.shape[1])
    counted = torch.ones(len(activation), dtype=torch.bool)
    return gradient_launch(activation, counted, counted.sum(), vector, vector, vector, torch.ones(()))


def test_a_launch_is_described_before_it_is_run() -> None:
    launch, gradient = described(torch.ones(3, 4, 5))
    assert gradient.isnan().all()
    launch.run()
    torch.testing.assert_close(gradient, torch.full((3, 4, 5), 1 / 15))


def test_offsets_have_64_bits() -> None:
    """Sample 2 of 2^30 elements begins at element 2^31, where an offset of 32 bits would be negative."""
    activation, gradient = vast((2, 3, 1, 2**30))
    launch, _ = described(torch.ones(3, 1, 4096))
    activation[2, 0, :4096] = 2.0
    arguments = {**launch.arguments, "x": activation, "gradient": gradient, "positions": 2**30}
    replace(launch, arguments=arguments).run()
    torch.testing.assert_close(2**30 * gradient[2, 0, :4096], torch.ones(4096))
