"""Whole stages traced with the decompositions: no operator is left that an engine lacks, and the gradient is right."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from tracing import PLAIN, assert_same, operators, run_eager, run_onnx, to_onnx, traced, usual_distance, vjp

from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.classifier import Classifier, Preprocessing, build_classifier, build_model
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import GuidanceRecipe, PriorRecipe, load_recipe
from diffdfkd.engine.stages import decode_stage, guidance_chain, unet_stage
from diffdfkd.engine.taps import BatchNormTaps, tappable

Mode = Literal["fake", "symbolic"]
MODES: tuple[Mode, ...] = get_args(Mode)
CLASSES, LATENT = 10, (4, 8, 8)

TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "convnext_tiny": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "vit": {},
}


class Decoder(nn.Module):
    """[B, 4, 8, 8] -> images [B, 3, size, size]; a stand-in with the operators of a VAE's decoder."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Upsample(scale_factor=size // 8),
            nn.Conv2d(8, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


def teacher(name: str) -> nn.Module:
    """A network of an architecture's name with random statistics in its BatchNorm layers."""
    torch.manual_seed(0)
    if name == "vit":
        from torchvision.models import VisionTransformer

        model: nn.Module = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
        nn.init.normal_(model.heads.head.weight)
    elif name in TORCHVISION:
        model = build_model(f"torchvision:{name}", TORCHVISION[name], 3, CLASSES, field="teacher")
    else:
        model = build_model(name, {}, 3, CLASSES, field="teacher")
    for layer in tappable(model).values():
        layer.running_mean.normal_(0, 0.1)
        layer.running_var.uniform_(0.5, 2)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def chain(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """x0, targets, alive -> what the guidance chain of a teacher gives, with BatchNorm guidance where it can be had."""
    model = teacher(name)
    size = 64 if name in TORCHVISION and name != "vit" else 32
    taps = BatchNormTaps(model) if tappable(model) else None
    weights = GuidanceRecipe(class_weight=1.0, batchnorm_weight=1.0 if taps else 0.0)
    made = guidance_chain(Decoder(size).requires_grad_(False), model, taps, weights, kernel="reference")
    return lambda *given: tuple(made(*given))


def demo_chain() -> tuple[Callable[..., tuple[Tensor, ...]], tuple[int, ...]]:
    """The guidance chain of the demonstration, and the shape of its latents."""
    recipe = load_recipe("fashion")
    prior = load_prior(recipe.prior, "cpu")
    classifier = build_classifier(recipe.teacher, recipe.teacher, field="teacher").eval().requires_grad_(False)
    made = guidance_chain(
        decode_stage(prior), classifier, BatchNormTaps(classifier.model), recipe.guidance, kernel="reference"
    )
    return lambda *given: tuple(made(*given)), prior.latent_shape


def batch(n: int, seed: int, latent: tuple[int, ...] = LATENT) -> tuple[Tensor, Tensor, Tensor]:
    """x0, targets and which samples are alive: all but the last."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, *latent, generator=generator)
    targets = torch.eye(CLASSES)[torch.arange(n) % CLASSES]
    return x0, targets, torch.arange(n) < n - 1


def assert_plain(graph: torch.fx.GraphModule) -> None:
    assert operators(graph) <= PLAIN, operators(graph) - PLAIN


def assert_engine_agrees(
    graph: torch.fx.GraphModule,
    function: Callable[..., tuple[Tensor, ...]],
    place: int,
    batches: list[tuple[Tensor, ...]],
) -> None:
    """The exported file asks for nothing that TensorRT lacks; onnxruntime's output `place` is autograd's to 1e-5."""
    model = to_onnx(graph, batches[0])
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"LayerNormalization", "ScatterND", "ScatterElements", "NonZero", "Loop", "GatherND"}, kinds
    for node in model.graph.node:
        if node.op_type == "MaxPool":
            assert len([name for name in node.output if name]) == 1
        if node.op_type == "Resize":
            assert not any(attribute.name == "antialias" and attribute.i for attribute in node.attribute)
    error = usual_distance([(run_onnx(model, given)[place], function(*given)[place]) for given in batches])
    assert error <= 1e-5, error


def assert_graph_agrees(
    graph: torch.fx.GraphModule, function: Callable[..., tuple[Tensor, ...]], batches: list[tuple[Tensor, ...]]
) -> None:
    error = usual_distance([(run_eager(graph, given)[0], function(*given)[0]) for given in batches])
    assert error <= 1e-5, error


class Small(nn.Module):
    """A teacher with one of each kind of layer: [B, 1, 12, 12] -> [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.Hardswish())
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.GELU(), nn.Linear(8, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.body(x)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def test_small_chain_runs_in_onnxruntime_at_any_batch() -> None:
    torch.manual_seed(0)
    classifier = Classifier(Small(), Preprocessing(1, 12, (0.5,), (0.5,), "bilinear"), list("0123456789"))
    classifier = classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    weights = GuidanceRecipe(class_weight=1.0, batchnorm_weight=1.0)
    made = guidance_chain(
        Decoder(16).requires_grad_(False), classifier, BatchNormTaps(classifier.model), weights, kernel="reference"
    )

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(made(*given))

    graph = traced(function, *batch(4, 0), mode="symbolic")
    assert_plain(graph)
    batches = [batch(4, 1), batch(2, 2), batch(9, 3)]
    assert_graph_agrees(graph, function, batches)
    assert_engine_agrees(graph, function, 0, batches)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_demo_chain(mode: Mode) -> None:
    function, latent = demo_chain()
    graph = traced(function, *batch(4, 0, latent), mode=mode)
    assert_plain(graph)
    batches = [batch(n, seed, latent) for seed, n in enumerate((4, 7, 2) if mode == "symbolic" else (4, 4, 4))]
    assert_graph_agrees(graph, function, batches)
    assert_engine_agrees(graph, function, 0, batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARCHITECTURES, *TORCHVISION])
def test_chain_of_every_teacher(name: str) -> None:
    function = chain(name)
    batches = [batch(4, seed) for seed in (1, 2, 3)]
    for mode in MODES:
        graph = traced(function, *batches[0], mode=mode)
        assert_plain(graph)
        assert_graph_agrees(graph, function, batches)
    assert_engine_agrees(graph, function, 0, batches)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd1", "tiny_sd2"])
@pytest.mark.parametrize("mode", MODES)
def test_vector_jacobian_product_of_unets(family: str, mode: Mode, request: pytest.FixtureRequest) -> None:
    prior = load_prior(PriorRecipe(path=str(request.getfixturevalue(family))), "cpu")
    function = vjp(unet_stage(prior))

    def given(n: int, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x, cotangent = (torch.randn(n, *prior.latent_shape, generator=generator) for _ in range(2))
        context = torch.randn(n, 77, prior.unet.config.cross_attention_dim, generator=generator)
        return x, cotangent, torch.full((n,), 500.0), context

    graph = traced(function, *given(2, 0), mode=mode)
    assert_plain(graph)
    batches = [given(3 if mode == "symbolic" else 2, 1), given(2, 2)]
    for inputs in batches:
        assert_same(run_eager(graph, inputs), function(*inputs), 1e-5)
    assert_engine_agrees(graph, function, 1, batches)
