"""A doubled image's convolution as one operation: against the two that it stands for, and autograd, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import classifier, open_prior, prior_stage
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from tracing import distance, vjp

from diffdfkd.engine.engine_stages import Batches
from diffdfkd.engine.folded_upsampling import FoldedUpsampling, Form, by_phases, fold, transposed
from diffdfkd.engine.trace import trace

FORMS = [transposed, by_phases]
aten = torch.ops.aten


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 2)], ids=str)
def test_it_is_the_two_operations(form: Form, bias: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    shift = torch.randn(4, dtype=torch.float64) if bias else None

    def plain(image: Tensor) -> Tensor:
        return functional.conv2d(functional.interpolate(image, scale_factor=2.0), weight, shift, padding=1)

    def folded(image: Tensor) -> Tensor:
        return form(image, fold(weight), shift)

    cotangent = torch.randn_like(plain(image))
    for made, expected in zip(vjp(folded)(image, cotangent), vjp(plain)(image, cotangent), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def graph(function: Callable[[Tensor], Tensor], image: Tensor, form: Form = transposed) -> torch.fx.GraphModule:
    with torch.no_grad(), FoldedUpsampling(form):
        made = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(image)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def operators(made: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in made.graph.nodes if node.op == "call_function"]


def frozen(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).requires_grad_(False)


FOLDED: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "nn.Upsample": lambda: (frozen(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1)), 1),
    "by size": lambda: (frozen(nn.Upsample(size=(12, 12)), nn.Conv2d(4, 6, 3, padding=1)), 1),
    "nearest-exact": lambda: (
        frozen(nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(4, 6, 3, padding=1)),
        1,
    ),
    "factor of the sizes": lambda: (
        frozen(nn.Upsample(scale_factor=2.1, recompute_scale_factor=True), nn.Conv2d(4, 6, 3, padding=1)),
        1,
    ),
    "two in a row": lambda: (
        frozen(*[nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()] * 2),
        2,
    ),
    "diffusers": lambda: (diffusers_upsampler(), 1),
    "tiny autoencoder": lambda: (tiny_decoder(), 3),
}


def diffusers_upsampler() -> nn.Module:
    from diffusers.models.upsampling import Upsample2D

    made: nn.Module = Upsample2D(4, use_conv=True)
    return made.requires_grad_(False)


def tiny_decoder() -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    made: nn.Module = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).requires_grad_(False)
    return made.decoder


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("form", FORMS)
def test_networks_are_folded_wherever_they_double(name: str, form: Form) -> None:
    torch.manual_seed(0)
    network, doublings = FOLDED[name]()
    image = torch.randn(2, 4, 6, 6)
    made = graph(network, image, form)
    found = operators(made)
    assert aten.upsample_nearest2d.default not in found
    kernels = [
        tuple(made.get_parameter(node.args[1].target).shape)
        if node.args[1].target in dict(made.named_parameters())
        else tuple(getattr(made, node.args[1].target).shape)
        for node in made.graph.nodes
        if node.target == aten.convolution.default
    ]
    assert sum(shape[2:] == ((4, 4) if form is transposed else (2, 2)) for shape in kernels) == doublings
    assert distance(made(image), network(image)) <= 1e-6


class Twice(nn.Module):
    """A doubled image that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        doubled = functional.interpolate(image, scale_factor=2.0)
        return self.convolution(doubled) + doubled


def test_a_doubled_image_that_is_read_elsewhere_is_still_there() -> None:
    network, image = Twice().requires_grad_(False), torch.randn(1, 4, 6, 6)
    made = graph(network, image)
    assert operators(made).count(aten.upsample_nearest2d.default) == 1
    assert [node.args[6] for node in made.graph.nodes if node.target == aten.convolution.default] == [True]
    assert distance(made(image), network(image)) <= 1e-6


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Upsample(scale_factor=3), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=(2, 1)), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding="same")),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, stride=2)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 5, padding=2)),
        (nn.Upsample(scale_factor=2), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=2), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=2.1), nn.Conv2d(4, 4, 3, padding=1)),
    ],
    ids=repr,
)
def test_other_pairs_stay(layers: tuple[nn.Module, ...]) -> None:
    network, image = frozen(*layers), torch.randn(1, 4, 6, 6)
    expected = network(image)
    made = graph(network, image)
    assert unfolded(made)
    assert distance(made(image), expected) <= 1e-6
    with torch.no_grad(), FoldedUpsampling(transposed):
        assert torch.equal(network(image), expected)


def unfolded(made: torch.fx.GraphModule) -> bool:
    return [node.args[6] for node in made.graph.nodes if node.target == aten.convolution.default] == [False]


def test_what_was_doubled_is_written_to_before_it_is_convolved() -> None:
    convolution, image = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), torch.randn(1, 4, 6, 6)

    def late(image: Tensor) -> Tensor:
        image = image * 1
        doubled = functional.interpolate(image, scale_factor=2.0)
        image.mul_(3)
        made: Tensor = convolution(doubled)
        return made

    made = graph(late, image)
    assert unfolded(made)
    assert distance(made(image), late(image)) <= 1e-6


def test_inference_tensors_stay() -> None:
    network, image = frozen(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 6, 6)
    with torch.inference_mode(), FoldedUpsampling(transposed):
        assert torch.equal(network(image.clone()), network(image))


def test_gradients_end_where_they_ended() -> None:
    convolution = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)

    def ends(image: Tensor) -> Tensor:
        with torch.no_grad():
            doubled = functional.interpolate(image, scale_factor=2.0)
        return convolution(doubled).sum() + image.sum()

    with FoldedUpsampling(transposed):
        image = torch.randn(1, 4, 6, 6, requires_grad=True)
        (gradient,) = torch.autograd.grad(ends(image), image)
    assert torch.equal(gradient, torch.ones_like(image))


def test_weights_that_are_inputs_or_learn_stay() -> None:
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1))
    weights = {name: value.detach() for name, value in network.named_parameters()}
    image = torch.randn(1, 4, 6, 6)

    def given(image: Tensor, *values: Tensor) -> Tensor:
        made: Tensor = functional_call(network, dict(zip(weights, values, strict=True)), (image,))
        return made

    with torch.no_grad(), FoldedUpsampling(transposed):
        tracer = make_fx(given, tracing_mode="fake", _allow_non_fake_inputs=True)
        assert unfolded(tracer(image, *weights.values()))
    for learns in ("weight", "bias"):
        network.requires_grad_(False).get_parameter(f"1.{learns}").requires_grad_()
        for form in FORMS:
            with FoldedUpsampling(form):
                network(image).sum().backward()
            assert network.get_parameter(f"1.{learns}").grad is not None
            network.zero_grad()


@pytest.mark.parametrize("name", ["unet", "chain", "vjp", "decoder"])
@pytest.mark.parametrize(
    ("batches", "form"),
    [
        pytest.param(Batches(4), transposed, id="static"),
        pytest.param(Batches(4, 1, 6), transposed, id="ranged", marks=pytest.mark.slow),
        pytest.param(Batches(4, 1, 6), by_phases, id="ranged, by phases", marks=pytest.mark.slow),
    ],
)
def test_stages_are_traced_with_it(tiny_prior: Path, name: str, batches: Batches, form: Form) -> None:
    stage = prior_stage(name, open_prior(tiny_prior), batches, teacher=classifier())
    program, _ = trace(stage, doubling=form)
    doubling = [aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec]
    assert not any(node.target in doubling for node in program.graph.nodes)
    least, usual, most = stage.specification.range
    for rows in sorted({least, usual, most}):
        inputs = stage.examples(rows, 1)
        with torch.no_grad():
            for made, expected in zip(program.module()(*inputs), stage.reference(*inputs), strict=True):
                assert distance(made.float(), expected.float()) <= 1e-4
