import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.backends.channel_rows import group_norm, group_norm_backward


@pytest.mark.parametrize(("channels", "groups"), [(12, 4), (24, 4), (20, 1), (6, 6)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients_are_those_of_autograd(
    channels: int, groups: int, affine: bool, format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(3, channels, 5, 7, dtype=torch.float64) + 2).contiguous(memory_format=format)
    weight, bias = (torch.randn(channels, dtype=torch.float64) if affine else None for _ in range(2))
    leaf = x.clone().requires_grad_()
    expected = functional.group_norm(leaf, groups, weight, bias, 1e-6)
    cotangent = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, leaf, cotangent)
    made, mean, scale = group_norm(x, weight, bias, 3, channels, 35, groups, 1e-6)
    torch.testing.assert_close(made, expected.detach(), rtol=1e-10, atol=1e-10)
    wanted = [True, False, False]
    found = group_norm_backward(cotangent, x, mean, scale, weight, 3, channels, 35, groups, wanted)[0]
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


def test_half_precision_keeps_its_statistics_in_float32() -> None:
    torch.manual_seed(0)
    x = 100 + torch.randn(2, 12, 8, 8)
    made, mean, scale = group_norm(x.bfloat16(), None, None, 2, 12, 64, 3, 1e-6)
    assert made.dtype == torch.bfloat16 and mean.dtype == scale.dtype == torch.float32
    exact = functional.group_norm(x.bfloat16().double(), 3, eps=1e-6)
    assert (made.double() - exact).norm() < 1e-2 * exact.norm()


def test_channels_that_fill_vectors_and_weights_that_are_to_be_trained_go_the_usual_way() -> None:
    x = torch.randn(2, 32, 4, 4)
    assert group_norm(x, None, None, 2, 32, 16, 4, 1e-5) is NotImplemented
    plain: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(x, None, None, 2, 32, 16, 4, 1e-5)
    found = group_norm_backward(x, x, *plain[1:], None, 2, 32, 16, 4, [True, False, False])[0]
    assert found.shape == x.shape
