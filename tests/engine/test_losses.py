"""The class-activation losses against plain formulations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.classifier import Classifier, Preprocessing, build_model
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.feature_stages import Taps, stages_of
from diffdfkd.engine.losses import activation_losses, averaged, cam_loss, class_maps, grad_cams, sarc_loss

CLASSES = 4
BOTH = DistillationRecipe(cam_weight=1.0, sarc_weight=1.0)


def classifier(architecture: str = "small_cnn", seed: int = 0, size: int = 16, **options: Any) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(architecture, options, 1, CLASSES, field="student")
    return Classifier(model, Preprocessing(1, size, (0.5,), (0.5,), "bilinear"), list("abcd"))


def noise(images: int = 5, size: int = 16) -> Tensor:
    return torch.rand(images, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


NETWORKS = [
    ("small_cnn", {"width": 4}),
    ("resnet18", {"width": 4}),
    ("wrn_16_1", {}),
    ("vgg8", {"width": 4}),
    ("mobilenet_v2", {"width": 0.25}),
    ("shufflenet_v2", {"width": 0.5}),
    ("torchvision:resnet18", {}),
]


@pytest.mark.parametrize(("architecture", "options"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_mean_of_cam_and_bias_are_the_logits(architecture: str, options: dict[str, Any]) -> None:
    channels, size = (3, 64) if architecture.startswith("torchvision") else (1, 32)
    model = build_model(architecture, options, channels, CLASSES, field="student").double().eval()
    network = Classifier(model, Preprocessing(channels, size, (0.5,), (0.5,), "bilinear"), list("abcd"))
    images = noise(3, size).expand(-1, channels, -1, -1)
    stages = stages_of(network, BOTH, "student")
    with Taps(network.model, stages, frozen=False) as taps:
        logits = network(images)
        cam = class_maps(taps.last, taps.head.weight)
    assert cam.dtype == torch.float64 and cam.shape[2] * cam.shape[3] > 1
    torch.testing.assert_close(cam.mean((2, 3)) + taps.head.bias, logits)
    # At any coarser resolution too, also where sizes do not divide.
    torch.testing.assert_close(averaged(cam, 1, 1).mean((2, 3)) + taps.head.bias, logits)


@pytest.mark.parametrize(("architecture", "options"), NETWORKS[:6], ids=[name for name, _ in NETWORKS[:6]])
def test_grad_cams_equal_a_plain_formulation(architecture: str, options: dict[str, Any]) -> None:
    """Logit by logit and channel by channel, by a forward of its own that keeps every stage."""
    network = classifier(architecture, size=32, **options).eval()
    stages = stages_of(network, BOTH, "student")
    network.double()
    images, chosen = noise(3, 32), torch.tensor([2, 0, 3])
    with Taps(network.model, stages, frozen=False) as taps:
        network(images)
        found = grad_cams(taps, chosen, keep=False)
    assert len(found) == len(stages.maps) == 3
    for image, label in enumerate(chosen.tolist()):
        kept: list[Tensor] = []
        handles = [
            network.model.get_submodule(name).register_forward_hook(lambda _m, _i, map, kept=kept: kept.append(map))
            for name in stages.maps
        ]
        score = network(images[image : image + 1])[0, label]
        for handle in handles:
            handle.remove()
        for place, features in enumerate(kept):
            if place == 2 and stages.rectified:  # the map is that behind the ReLU, from which the logits are made anew
                features = functional.relu(features).detach().requires_grad_()
                score = taps.head(features.mean((2, 3)))[0, label]
            (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
            expected = torch.zeros(features.shape[2:], dtype=torch.float64)
            for channel in range(features.shape[1]):
                expected += gradient[0, channel].sum() / expected.numel() * features[0, channel].detach()
            torch.testing.assert_close(found[place][image].detach(), expected)


def test_gradient_reaches_the_students_features_alone() -> None:
    student, teacher = classifier(width=4).double(), classifier(width=6, seed=1).double().requires_grad_(False).eval()
    stages = stages_of(teacher, BOTH, "teacher"), stages_of(student, BOTH, "student")
    images = noise()
    with activation_losses(teacher, student, stages, BOTH) as losses:
        assert losses is not None
        logits = losses.answers(images)
        kl = torch.zeros((), dtype=torch.float64)
        student(images)
        terms = losses.added(kl, logits)
        assert not logits.requires_grad
        terms["loss"].backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(terms["loss"], terms["cam"] + terms["sarc"])
    gradients = {name: weight.grad for name, weight in student.named_parameters()}
    assert gradients["model.head.weight"] is None and gradients["model.head.bias"] is None
    assert all(gradient is not None for name, gradient in gradients.items() if "head" not in name)
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("term", ["cam", "sarc"])
def test_weights_of_the_maps_are_constants(term: str) -> None:
    """The gradient is that of maps whose weights were computed beforehand, by differences in float64."""
    student, teacher = classifier(width=3).double().eval(), classifier(width=5, seed=1).double().eval()
    teacher.requires_grad_(False)
    images, weight = noise(), student.model.get_parameter("features.3.0.weight")
    recipe = DistillationRecipe(**{f"{term}_weight": 1.0})  # type: ignore[arg-type]
    stages = stages_of(teacher, recipe, "teacher"), stages_of(student, recipe, "student")
    with activation_losses(teacher, student, stages, recipe) as losses:
        assert losses is not None
        logits = losses.answers(images)
        student(images)
        losses.added(torch.zeros((), dtype=torch.float64), logits)["loss"].backward()  # type: ignore[no-untyped-call]
    chosen = logits.argmax(1)

    def maps(network: Classifier, stage: Any, constants: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        with torch.enable_grad(), Taps(network.model, stage, frozen=False) as taps:
            score = network(images).gather(1, chosen[:, None]).sum()
            features = [taps.maps[name] for name in stage.maps]
            if constants is None:
                constants = [g.mean((2, 3), keepdim=True) for g in torch.autograd.grad(score, features)]
        if term == "cam":
            return [torch.einsum("bchw,kc->bkhw", features[-1], taps.head.weight)], constants
        pairs = zip(features, constants, strict=True)
        return [(feature * constant).sum(1) for feature, constant in pairs], constants

    teacher.requires_grad_(True)
    target, _ = maps(teacher, stages[0], None)
    _, constants = maps(student, stages[1], None)

    def loss() -> float:
        ours, _ = maps(student, stages[1], constants)
        return sum(float(((a - b).detach() ** 2).mean()) for a, b in zip(ours, target, strict=True))

    assert weight.grad is not None
    with torch.no_grad():
        for index in [(0, 0, 0, 0), (2, 1, 1, 2)]:
            step, before = 1e-6, weight[index].clone()
            weight[index] = before + step
            above = loss()
            weight[index] = before - step
            below = loss()
            weight[index] = before
            assert (above - below) / (2 * step) == pytest.approx(float(weight.grad[index]), rel=1e-4, abs=1e-12)


def test_equal_networks_lose_nothing() -> None:
    student, teacher = classifier(width=4).eval(), classifier(width=4).requires_grad_(False).eval()
    stages = stages_of(teacher, BOTH, "teacher"), stages_of(student, BOTH, "student")
    with activation_losses(teacher, student, stages, BOTH) as losses:
        assert losses is not None
        images = noise().float()
        logits = losses.answers(images)
        student(images)
        terms = losses.added(torch.zeros(()), logits)
    assert {name: float(term.detach()) for name, term in terms.items()} == {"loss": 0, "kl": 0, "cam": 0, "sarc": 0}


@pytest.mark.parametrize(("fine", "coarse"), [(8, 4), (7, 4), (8, 3), (5, 5)])
def test_maps_are_averaged_by_areas(fine: int, coarse: int) -> None:
    maps = torch.rand(2, 3, fine, fine, dtype=torch.float64)
    every = maps.repeat_interleave(coarse, -1).repeat_interleave(coarse, -2)  # a pixel's area, in equal parts
    expected = functional.avg_pool2d(every, fine)
    torch.testing.assert_close(averaged(maps, coarse, coarse), expected)


def test_resolutions_are_met_at_the_coarser_one() -> None:
    flat = torch.rand(2, CLASSES, 1, 1, dtype=torch.float64)
    assert cam_loss(flat.expand(-1, -1, 4, 4), flat.expand(-1, -1, 7, 7)) < 1e-30
    fine, coarse = (torch.rand(2, CLASSES, size, size, dtype=torch.float64) for size in (6, 3))
    for pair in ((fine, coarse), (coarse, fine)):
        torch.testing.assert_close(cam_loss(*pair), functional.mse_loss(functional.avg_pool2d(fine, 2), coarse))
    # The same features at half the resolution: a_k is a mean, so that the coarser Grad-CAM is four times as large.
    teacher = [flat[:, 0].expand(-1, 8, 8)]
    assert sarc_loss([4 * flat[:, 0].expand(-1, 4, 4)], teacher) < 1e-30
    assert sarc_loss([flat[:, 0].expand(-1, 4, 4)], teacher) > 1e-3
