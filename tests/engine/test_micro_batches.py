"""Two passes over micro-batches against the one-batch chain, which test_stages.py holds to the plain formulation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_chain import CLASSES, WEIGHTS, Decoder, batch, classifier
from torch import Tensor, nn

from diffdfkd.engine.micro_batches import micro_batched_chain, unet_in_parts
from diffdfkd.engine.recipe import GuidanceRecipe
from diffdfkd.engine.stages import Gradient, guidance_chain
from diffdfkd.engine.taps import guidance_taps

CASES: list[dict[str, Any]] = [
    {},
    {"statistics": "class"},
    {"layer_weights": "relative"},
    {"layer_weights": "relative", "statistics": "class"},
    {"layers": ["1"]},
    {"batchnorm_weight": 0.0},
    {"class_weight": 0.0, "adversarial_weight": 0.0},
]


class Watched(nn.Module):
    """A network that keeps count of the images that it sees at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, [0]
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        answer: Tensor = self.network(images)
        return answer


def both(
    weights: GuidanceRecipe, size: int, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., Gradient], Callable[..., Gradient], list[Watched]]:
    """The chain of the whole batch, the one in micro-batches, and the latter's networks."""
    torch.manual_seed(5)
    decoder = Decoder().to(dtype).requires_grad_(False)
    teacher, student = classifier(1).to(dtype), classifier(1).to(dtype)
    student[-1].weight.mul_(0.3)
    student[-1].bias.mul_(0.3)
    taps = guidance_taps(teacher, weights) if weights.batchnorm_weight > 0 else None
    watched = [Watched(network) for network in (decoder, teacher, student)]
    return (
        guidance_chain(decoder, teacher, taps, weights, student),
        micro_batched_chain(watched[0], watched[1], taps, weights, watched[2], size=size),
        watched,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_gradient_is_that_of_one_batch(case: dict[str, Any], size: int) -> None:
    weights = WEIGHTS.model_copy(update=case)
    whole, parts, watched = both(weights, size)
    x0, targets, alive = batch(8)
    # Samples that differ from part to part, or a part's own moments would do.
    x0 = x0 + torch.linspace(0, 2, 8, dtype=x0.dtype).view(-1, 1, 1, 1)
    x0[1, 0, 0, 0], alive[6] = float("nan"), False
    for shares in (None, torch.tensor([0.3, 2.0, 0.7], dtype=torch.float64)):
        expected, made = (chain(x0, targets, alive, shares) for chain in (whole, parts))
        assert torch.equal(made.finite, expected.finite)
        for name in ("gradient", "norm", "losses"):
            a, b = getattr(made, name), getattr(expected, name)
            assert b.abs().max() > 1e-5 and (a - b).abs().max() <= 1e-12 * b.abs().max(), name
    assert [max(network.seen) for network in watched] == [size, size, size if weights.adversarial_weight else 0]


def test_in_float32_it_is_within_rounding() -> None:
    whole, parts, _ = both(WEIGHTS, 16, torch.float32)
    x0, targets, alive = batch(64, torch.float32)
    expected, made = (chain(x0, targets, alive) for chain in (whole, parts))
    torch.testing.assert_close(made.gradient, expected.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.losses, expected.losses, rtol=1e-5, atol=1e-6)
    assert made.gradient.is_contiguous() or made.gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("statistics", ["batch", "class"])
def test_nobody_alive_gives_no_gradient(statistics: str) -> None:
    _, parts, _ = both(GuidanceRecipe.model_validate({"statistics": statistics}), 2)
    x0, targets, alive = batch(3)
    made = parts(x0 * float("nan"), targets, ~alive)
    assert not made.gradient.any() and not made.finite.any() and made.losses.isfinite().all()


def test_a_unet_sees_so_many_rows_at_once() -> None:
    seen = []

    def unet(sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        seen.append(len(sample))
        return sample * timestep[:, None, None, None] + context.mean((1, 2))[:, None, None, None]

    given = torch.randn(7, 2, 4, 4), torch.arange(7.0), torch.randn(7, 3, 5)
    assert torch.equal(unet_in_parts(unet, 3)(*given), unet(*given))
    assert seen == [3, 3, 1, 7]


def test_classes_are_those_of_the_targets() -> None:
    """Else the statistics of classes would be those of the batch, and every test above pass on either."""
    x0, targets, alive = batch(8)
    assert len({*targets.argmax(1).tolist()}) == CLASSES
    losses = [
        both(WEIGHTS.model_copy(update={"statistics": s}), 3)[1](x0, targets, alive).losses[2]
        for s in ("batch", "class")
    ]
    assert abs(losses[0] - losses[1]) > 1e-4
