import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffdfkd.engine.architectures import ARCHITECTURES, small_cnn
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.engine.weights import load_weights

PUBLISHED = Path(__file__).with_name("published")
"""Keys and shapes of the state dicts that github.com/zju-vipa/Fast-Datafree (commit 0dcecbc) publishes, written down
from its modules, and what these modules answer to `numbers`."""

SMALL: dict[str, dict[str, Any]] = {
    "small_cnn": {"width": 2},
    "resnet18": {"width": 2},
    "resnet34": {"width": 2},
    "vgg8": {"width": 2},
    "vgg11": {"width": 2},
    "mobilenet_v2": {"width": 0.1},
    "shufflenet_v2": {"width": 0.5},
}

# name: parameters, BatchNorm layers, millions of multiply-adds; for 3x32x32 images and 10 classes
SIZES = {
    "resnet18": (11_173_962, 20, 555),
    "resnet34": (21_282_122, 36, 1159),
    "wrn_16_1": (175_066, 13, 27),
    "wrn_16_2": (691_674, 13, 101),
    "wrn_40_1": (563_930, 37, 83),
    "wrn_40_2": (2_243_546, 37, 328),
    "vgg8": (3_918_858, 5, 96),
    "vgg11": (9_231_114, 8, 209),
    "mobilenet_v2": (2_236_682, 52, 88),
    "shufflenet_v2": (1_263_854, 56, 45),
}


def small(name: str, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name](channels=channels, classes=5, **SMALL.get(name, {})).eval()


def numbers(shape: list[int], place: int, key: str = "") -> Tensor:
    """Float64 numbers that any program can repeat, spread as those of a trained network are."""
    waves = torch.arange(math.prod(shape), dtype=torch.float64).add(1 + 7 * place).mul(12.9898).sin()
    values = waves.mul(43758.5453).frac().reshape(shape)
    if len(shape) > 1:
        return values * math.sqrt(6 / math.prod(shape[1:]))
    return values.abs() + 0.5 if key.endswith("running_var") or (".weight" in key) else values * 0.2


def published(name: str) -> tuple[dict[str, list[int]], list[float]]:
    """Shapes by key, and logits."""
    *lines, last = (PUBLISHED / f"{name}.txt").read_text().splitlines()
    shapes = {}
    for line in lines:
        key, shape = line.split()
        shapes[key] = [int(size) for size in shape.split("x")] if shape != "scalar" else []
    assert last.startswith("logits ")
    return shapes, [float(value) for value in last.split()[1:]]


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_sizes_that_their_docstrings_state(name: str) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name](channels=3, classes=10).eval()
    parameters, layers, millions = SIZES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == layers
    operations = FlopCounterMode(display=False)
    with torch.device("meta"), operations:
        model(torch.zeros(1, 3, 32, 32))
    assert round(operations.get_total_flops() / 2e6) == millions
    text = ARCHITECTURES[name].__doc__ or ""
    assert f"{layers} BatchNorm layers, {millions:,} million multiply-adds" in text
    stated = float(text.split(" million parameters")[0].split()[-1])
    assert abs(stated - parameters / 1e6) < (0.005 if stated < 1 else 0.05)


@pytest.mark.parametrize("name", ["resnet34", "wrn_40_2", "vgg11"])
def test_published_state_dicts_load_and_mean_what_they_meant(name: str, tmp_path: Path) -> None:
    shapes, logits = published(name)
    state = {key: numbers(shape, place, key) for place, (key, shape) in enumerate(shapes.items())}
    path = tmp_path / "cifar10.pth"
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 200, "arch": name, "state_dict": wrapped, "best_acc1": 94.87}, path)
    model = ARCHITECTURES[name](channels=3, classes=10).double().eval()
    load_weights(model, path, field="teacher")
    with torch.no_grad():
        (answer,) = model(numbers([1, 3, 32, 32], 0))
    torch.testing.assert_close(answer, torch.tensor(logits, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    del wrapped[f"module.{next(iter(state))}"]
    torch.save(wrapped, path)
    with pytest.raises(UserError, match=rf"1 missing \({next(iter(state))}\)"):
        load_weights(model, path, field="teacher")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_batchnorm_layer_is_tapped_in_the_order_of_the_forward(name: str, channels: int) -> None:
    model = small(name, channels)
    classifier = Classifier(model, Preprocessing(channels, 32, (0.5,), (0.5,), "bilinear"), list("abcde"))
    classifier.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    seen: list[str] = []
    kept: list[Tensor] = []

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(names[layer])
        kept.append(inputs[0].clone())

    names = {layer: known for known, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    for layer in names:
        layer.register_forward_pre_hook(note)
    with BatchNormTaps(model) as taps:
        images = torch.rand(2, channels, 32, 32, requires_grad=True)
        logits = classifier(images)
        assert logits.shape == (2, 5) and seen == taps.names
        assert all(torch.equal(now, then) for now, then in zip(taps.inputs, kept, strict=True))
        (gradient,) = torch.autograd.grad(torch.stack([each.square().mean() for each in taps.inputs]).sum(), images)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet18", "wrn_16_1", "vgg8", "shufflenet_v2"])
def test_networks_export_with_any_batch(name: str) -> None:
    model, batch = small(name), torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        images = torch.rand(3, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_answer_the_same_under_onnxruntime(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = small(name), tmp_path / "model.onnx"
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (torch.rand(2, 3, 32, 32),), path, dynamo=True, opset_version=21, dynamic_shapes=dynamic)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 32, 32)
    (answer,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("name", ["resnet18", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v2"])
def test_networks_take_other_sizes(name: str, size: int) -> None:
    assert small(name, 1)(torch.rand(2, 1, size, size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("resnet18", {"width": 0}, r"options.width: got 0; a whole number from 1 on"),
        ("resnet34", {"width": True}, r"options.width: got True; a whole number"),
        ("vgg11", {"width": 2.5}, r"options.width: got 2.5; a whole number"),
        ("wrn_16_2", {"dropout": 1}, r"options.dropout: got 1; a number from 0 to below 1"),
        ("mobilenet_v2", {"width": 0}, r"options.width: got 0; a number above 0 and up to 4"),
        ("mobilenet_v2", {"dropout": "a"}, r"options.dropout: got 'a'; a number"),
        ("shufflenet_v2", {"width": 3}, r"options.width: got 3; one of 0.5, 1.0, 1.5, 2.0"),
        ("shufflenet_v2", {"stem": 5}, r"options.stem: got 5; one of 3, 1"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        ARCHITECTURES[name](channels=3, classes=10, **options)


def test_small_cnn_has_the_size_that_its_docstring_states() -> None:
    model = small_cnn(channels=1, classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 334_442
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules()) == 8
    operations = FlopCounterMode(display=False)
    with operations:
        model(torch.zeros(1, 1, 28, 28))
    assert 11.5e6 < operations.get_total_flops() / 2 < 12.5e6


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 33)])
def test_small_cnn_takes_other_images(channels: int, size: int) -> None:
    model = small_cnn(channels=channels, classes=3, width=8, blocks=(0, 1, 0)).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 3)


def test_small_cnn_refuses_impossible_options() -> None:
    with pytest.raises(UserError, match=r"options.width: got 0"):
        small_cnn(1, 10, width=0)
    with pytest.raises(UserError, match=r"options.blocks: got \[1\]"):
        small_cnn(1, 10, blocks=[1])
