from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tracing import assert_same, check_operator, distance

from diffdfkd.engine.attention import ATTENTION

aten = torch.ops.aten


def attention(**options: Any) -> Callable[[Tensor], Tensor]:
    """Of x [B, h, T, E] to itself in three guises."""
    return lambda x: functional.scaled_dot_product_attention(x, x * x, x.sin(), **options)


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    part = torch.rand(7, 7, generator=generator) > 0.4
    empty = part.clone()
    empty[2] = False
    return {
        "part": part,
        "empty row": empty,
        "bias": torch.randn(7, 7, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}], ids=str)
def test_attention_and_its_gradient_are_autograds(options, symbolic):
    check_operator(attention(**options), 3, 2, 7, 6, symbolic=symbolic)


@pytest.mark.parametrize("name", ["part", "empty row", "bias"])
def test_masks(name):
    check_operator(attention(attn_mask=masks()[name]), 3, 2, 7, 6)


def test_fewer_keys_than_queries():
    check_operator(lambda x: functional.scaled_dot_product_attention(x, x[:, :, :5].cos(), x[:, :, :5]), 3, 2, 7, 6)


def test_torchs_own_plain_form_and_its_layer():
    def plain(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention()(x)

    check_operator(plain, 3, 2, 7, 6)
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double().eval().requires_grad_(False)
    check_operator(lambda x: layer(x, x, x, need_weights=False)[0], 3, 7, 6)


def test_dropout_and_shared_heads_are_left_to_the_operator():
    decomposed = ATTENTION[aten._scaled_dot_product_flash_attention_for_cpu.default]
    query, key = torch.rand(1, 4, 3, 2), torch.rand(1, 2, 3, 2)
    assert decomposed(query, query, query, 0.1) is NotImplemented
    assert decomposed(query, key, key) is NotImplemented


@pytest.mark.parametrize("kind", ["efficient", "flash", "cudnn"])
def test_what_stands_for_the_operators_of_cuda_has_their_signatures(kind):
    """Called as torch's generated code calls them; the values are those of the CPU's operator."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    forward = getattr(aten, f"_scaled_dot_product_{kind}_attention").default
    backward = getattr(aten, f"_scaled_dot_product_{kind}_attention_backward").default
    bias = () if kind == "flash" else (None, True)
    made = ATTENTION[forward](query, key, value, *bias, 0.0, True)
    assert len(made) == len(forward._schema.returns)
    out, logsumexp = made[:2]
    seeds = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    lengths = None, None, 5, 5
    gradients = {
        "efficient": lambda call: call(
            gradient, query, key, value, None, out, logsumexp, *seeds, 0.0, [True, True, True, False], True
        ),
        "flash": lambda call: call(gradient, query, key, value, out, logsumexp, *lengths, 0.0, True, *seeds),
        "cudnn": lambda call: call(gradient, query, key, value, out, logsumexp, *seeds, None, *lengths, 0.0, True),
    }[kind](ATTENTION[backward])
    assert len(gradients) == len(backward._schema.returns)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*leaves, is_causal=True)
    assert distance(out, expected.detach()) < 1e-12
    scores = (query @ key.transpose(-2, -1) / 2).masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    assert distance(logsumexp, scores.logsumexp(-1)) < 1e-12
    assert_same(gradients[:3], torch.autograd.grad(expected, leaves, gradient), 1e-12)
