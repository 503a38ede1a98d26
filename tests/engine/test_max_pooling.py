import pytest
import torch
from torch import Tensor
from torch.nn import functional
from tracing import check_operator

from diffdfkd.engine.max_pooling import max_pool_backward

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (3, 1, 1, 1, False),
    (2, 3, 0, 1, False),
    (3, 2, 1, 1, True),
    (2, 2, 0, 1, True),
    (3, 2, 1, 2, False),
    (3, 3, 1, 2, True),
    ((3, 2), (2, 1), (1, 0), 1, False),
    (1, 2, 0, 1, False),
    (3, None, 0, 1, False),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradient_is_autograds(window):
    check_operator(lambda x: functional.max_pool2d(x, *window), 3, 2, 9, 7, whole=True)
    check_operator(lambda x: functional.max_pool2d(x, *window), 2, 2, 8, 12, symbolic=True)


def test_unbatched_input():
    check_operator(lambda x: functional.max_pool2d(x, 3, 2, 1), 4, 9, 7, whole=True)


@pytest.mark.parametrize("size", [1, 2, (4, 2)])
def test_adaptive_pooling_to_sizes_that_divide(size):
    check_operator(lambda x: functional.adaptive_max_pool2d(x, size), 3, 2, 8, 8, whole=True)


def test_first_largest_value_takes_all():
    gradient = max_pool_backward(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2), [2], [2], [0], [1], False)
    assert torch.equal(gradient, torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_exact_where_windows_lie_apart(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    leaf = x.clone().requires_grad_()
    cotangent: Tensor = torch.randn(2, 3, 4, 4).to(dtype)
    functional.max_pool2d(leaf, 2).backward(cotangent)
    assert torch.equal(max_pool_backward(cotangent, x, [2], [2], [0], [1], False), leaf.grad)
