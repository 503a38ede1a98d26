from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine.classifier import Classifier, Preprocessing, build_model
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.feature_stages import Taps, stages_of
from diffdfkd.engine.losses import grad_cams

BOTH = DistillationRecipe(cam_weight=1.0, sarc_weight=1.0)
CAM = DistillationRecipe(cam_weight=1.0)


def wrapped(model: nn.Module, channels: int = 3, size: int = 32) -> Classifier:
    return Classifier(model, Preprocessing(channels, size, (0.5,), (0.5,), "bilinear"), list("abcd"))


def built(architecture: str, size: int = 32, **options: Any) -> Classifier:
    return wrapped(build_model(architecture, options, 3, 4, field="student"), 3, size)


@pytest.mark.parametrize(
    ("architecture", "options", "maps", "head", "rectified"),
    [
        ("small_cnn", {"width": 4}, ("features.2", "features.5", "features.7"), "head", False),
        ("resnet34", {"width": 4}, ("layer2", "layer3", "layer4"), "linear", False),
        ("wrn_40_1", {}, ("block1", "block2", "bn1"), "fc", True),
        ("vgg11", {"width": 4}, ("block1", "block2", "block4"), "classifier", True),
        ("mobilenet_v2", {"width": 0.25}, ("features.6", "features.13", "features.18"), "classifier.1", False),
        ("shufflenet_v2", {"width": 0.5}, ("layer1", "layer2", "bn2"), "linear", True),
        # A first convolution of a stage that keeps the resolution, and squeeze-and-excitation, mislead nobody.
        ("torchvision:resnet50", {}, ("layer2", "layer3", "layer4"), "fc", False),
        ("torchvision:regnet_y_400mf", {}, tuple(f"trunk_output.block{n}" for n in (2, 3, 4)), "fc", False),
    ],
)
def test_stages_are_the_last_modules_of_each_resolution(
    architecture: str, options: dict[str, Any], maps: tuple[str, ...], head: str, rectified: bool
) -> None:
    network = built(architecture, 64 if ":" in architecture else 32, **options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    found = stages_of(network, BOTH, "student")
    assert (found.maps, found.head, found.rectified) == (maps, head, rectified)
    assert stages_of(network, CAM, "student").maps == maps[-1:]
    # Looking changes nothing.
    assert all(module.training for module in network.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class InPlace(nn.Module):
    """What follows each stage writes over it, as in torchvision's DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.three = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.side = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        self.side(images)
        hidden = torch.relu_(self.two(torch.relu_(self.one(images))))
        return self.head(torch.relu_(self.three(hidden)).mean((2, 3)))


def test_a_frozen_network_that_writes_over_its_maps() -> None:
    """Its graph begins at the first stage, and the maps are those that the next layer reads."""
    network = wrapped(InPlace()).requires_grad_(False).eval()
    given = BOTH.model_copy(update={"teacher_stages": ["one", "two", "three"]})
    stages = stages_of(network, given, "teacher")
    images, chosen = torch.rand(2, 3, 32, 32), torch.tensor([1, 3])
    with Taps(network.model, stages, frozen=True) as taps:
        logits = network(images)
        assert logits.requires_grad
        frozen = grad_cams(taps, chosen, keep=False)
    network.requires_grad_(True)
    with Taps(network.model, stages, frozen=False) as taps:
        network(images)
        free = grad_cams(taps, chosen, keep=False)
    for one, other in zip(frozen, free, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match=r"distillation.teacher_stages: the logits do not hang on side"):
        stages_of(network, BOTH.model_copy(update={"teacher_stages": ["side", "one", "three"]}), "teacher")


def test_named_stages_are_taken() -> None:
    names = ["layer1", "layer2.0", "layer4"]
    assert stages_of(built("resnet18", width=4), BOTH.model_copy(update={"student_stages": names}), "student").maps == (
        *names,
    )


class Scaled(nn.Module):
    """Logits that a linear layer does not end."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return 9 * self.head(self.body(images).mean((2, 3)))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), *layers)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (Scaled(), {}, ["student.architecture", "not the output of a linear layer"]),
        (
            flat(nn.Flatten(), nn.Linear(8 * 256, 4)),
            {},
            ["student.architecture", "2 does not read the mean over space of 0"],
        ),
        (
            flat(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
            {},
            ["student.architecture", "3 does not read the mean over space of 0", "distillation.student_stages"],
        ),
        (
            flat(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
            {"sarc_weight": 1.0},
            ["student.architecture", "maps of 1 resolution(s)", "read 3", "distillation.student_stages"],
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), {}, ["student.architecture", "maps of 0"]),
    ],
    ids=["scaled", "flattened", "maximum", "one resolution", "no map"],
)
def test_a_network_without_class_activation_maps(model: nn.Module, fields: dict[str, float], words: list[str]) -> None:
    recipe = DistillationRecipe(cam_weight=1.0, **fields)  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        stages_of(wrapped(model), recipe, "student")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["layer2", "layer3", "layer5"], ["no module layer5", "layer4"]),
        (["layer2", "layer3", "linear"], ["linear gives no map", "layer4"]),
        (["layer3", "layer2", "layer4"], ["layer3, layer2, layer4", "order"]),
        (["layer2", "layer2", "layer4"], ["layer2, layer2, layer4", "order"]),
    ],
)
def test_names_that_are_no_stages(names: list[str], words: list[str]) -> None:
    recipe = BOTH.model_copy(update={"student_stages": names})
    with pytest.raises(UserError) as error:
        stages_of(built("resnet18", width=4), recipe, "student")
    assert str(error.value).startswith("distillation.student_stages: ")
    for word in words:
        assert word in str(error.value)


def test_a_stage_before_the_last_cannot_be_read() -> None:
    recipe = BOTH.model_copy(update={"student_stages": ["layer1", "layer2", "layer3"]})
    with pytest.raises(UserError, match=r"linear does not read the mean over space of layer3"):
        stages_of(built("resnet18", width=4), recipe, "student")
