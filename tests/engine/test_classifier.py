from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from diffdfkd.engine.classifier import Classifier, Preprocessing, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import ClassifierRecipe, TeacherRecipe
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.engine.weights import save_classifier

SMALL: dict[str, Any] = {"width": 2, "blocks": [0, 0, 0]}


def preprocessing(channels: int = 1, size: int = 28, interpolation: str = "bilinear") -> Preprocessing:
    return Preprocessing(channels, size, (0.0,), (1.0,), interpolation)


def teacher_recipe(**changes: Any) -> TeacherRecipe:
    fields = {"architecture": "small_cnn", "options": SMALL, "classes": ["a", "b", "c"], "channels": 1, "size": 16}
    return TeacherRecipe.model_validate({**fields, **changes})


def head(classifier: Classifier) -> torch.Tensor:
    """Its last weights."""
    return classifier.model.state_dict()["head.weight"]


def student(architecture: str = "small_cnn", seed: int | None = 0, teacher: Any = {}, **fields: Any) -> Classifier:  # noqa: B006
    recipe = ClassifierRecipe(architecture=architecture, **fields)
    return build_classifier(recipe, teacher_recipe(**teacher), field="student", seed=seed)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("before", "after"), [(32, 28), (64, 28), (20, 33)])
def test_resize_is_torchvisions(interpolation: str, before: int, after: int) -> None:
    images = torch.rand(2, 3, before, before, generator=torch.Generator().manual_seed(0))
    wanted = transforms.resize(images, [after, after], InterpolationMode(interpolation), antialias=True)
    torch.testing.assert_close(preprocessing(3, after, interpolation)(images), wanted, rtol=0, atol=1e-6)


def test_channels_are_converted_as_torchvision_does() -> None:
    colour = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(preprocessing(1)(colour), transforms.rgb_to_grayscale(colour), rtol=0, atol=2e-4)
    grey = torch.rand(2, 1, 28, 28)
    assert torch.equal(preprocessing(3)(grey), transforms.grayscale_to_rgb(grey))


@pytest.mark.parametrize(
    ("mean", "std"), [((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.1,), (0.5, 0.6, 0.7)), ((0.1,), (0.5,))]
)
def test_normalisation_is_torchvisions(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.rand(2, 3, 8, 8)
    wanted = transforms.normalize(images, list(mean) * (3 // len(mean)), list(std) * (3 // len(std)))
    torch.testing.assert_close(Preprocessing(3, 8, mean, std, "bilinear")(images), wanted)


def test_bgr_turns_the_channels_round_before_mean_and_std() -> None:
    images = torch.rand(2, 3, 12, 12, requires_grad=True)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    ordered = Preprocessing(3, 8, mean, std, "bilinear", "bgr")
    wanted = transforms.normalize(transforms.resize(images, [8, 8], antialias=True).flip(1), list(mean), list(std))
    torch.testing.assert_close(ordered(images), wanted)
    assert torch.equal(ordered.fit(images), preprocessing(3, 8).fit(images))
    plain = Preprocessing(3, 12, (0.5,), (0.5,), "bilinear", "bgr")
    torch.testing.assert_close(plain(images), (images.flip(1) - 0.5) / 0.5)
    (gradient,) = torch.autograd.grad(ordered(images)[:, 0].sum(), images)
    assert (gradient[:, 2] != 0).all() and (gradient[:, :2] == 0).all()
    assert student("resnet18", options={"width": 2}, teacher={"channels": 3, "channel_order": "bgr"}).preprocessing == (
        Preprocessing(3, 16, (0.5,), (0.5,), "bilinear", "bgr")
    )


def test_an_image_of_the_right_size_passes_unchanged() -> None:
    images = torch.rand(2, 1, 28, 28)
    assert preprocessing().fit(images) is images


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_reaches_every_pixel(channels: int) -> None:
    network = student(options={"width": 4}, teacher={"size": 14, "mean": [0.3], "std": [0.2]}).eval()
    images = torch.rand(2, channels, 32, 32, dtype=torch.float64, requires_grad=True)
    network.double()
    assert torch.autograd.gradcheck(lambda some: network(some[:, :, 8:24, 8:24]), images[:1], fast_mode=True)
    (gradient,) = torch.autograd.grad(network(images).square().sum(), images)
    assert (gradient != 0).float().mean() > 0.95


def test_a_student_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = student(options=SMALL), student(options=SMALL), student(options=SMALL, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(head(first), head(again))
    assert not torch.equal(head(first), head(other))
    assert first.training and all(parameter.requires_grad for parameter in first.parameters())
    assert first.classes == ["a", "b", "c"] and first(torch.rand(2, 3, 20, 20)).shape == (2, 3)


def test_a_teacher_is_frozen_and_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.weights: missing"):
        build_classifier(teacher_recipe(), teacher_recipe(), field="teacher")
    path = tmp_path / "teacher.safetensors"
    save_classifier(student(options=SMALL), path, {})
    recipe = teacher_recipe(weights=str(path))
    teacher = build_classifier(recipe, recipe, field="teacher")
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(head(teacher), head(student(options=SMALL)))


def test_torchvision_and_own_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = {"channels": 3, "size": 32}
    assert student("torchvision:resnet18", teacher=three)(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(UserError, match=r"student.architecture: takes 3 channel\(s\), but teacher.channels is 1"):
        student("torchvision:resnet18")
    with pytest.raises(UserError, match=r"torchvision has no classifier resnet19 \(did you mean resnet1"):
        student("torchvision:resnet19")
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def plain(classes, size=16): return nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))\n"
        "def wrong(): return nn.Sequential(nn.Flatten(), nn.Linear(256, 7))\n"
        "def nothing(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert student("own_networks:plain")(torch.rand(2, 1, 16, 16)).shape == (2, 3)
    (tmp_path / "2024-nets.py").write_text((tmp_path / "own_networks.py").read_text())  # which `import` could not name
    assert student("2024-nets:plain")(torch.rand(2, 1, 16, 16)).shape == (2, 3)
    with pytest.raises(UserError, match=r"fails on a 1x16x16 image: mat1 and mat2"):
        student("own_networks:plain", options={"size": 4})
    with pytest.raises(UserError, match=r"student.options.width: unknown option; allowed: size"):
        student("own_networks:plain", options={"width": 4})
    with pytest.raises(UserError, match=r"gives \[2, 7\] for 2 images, but teacher.classes names 3"):
        student("own_networks:wrong")
    with pytest.raises(UserError, match="returned int, not a torch"):
        student("own_networks:nothing")
    with pytest.raises(UserError, match="own_networks has no function absent"):
        student("own_networks:absent")
    with pytest.raises(UserError, match="cannot import no_such_module"):
        student("no_such_module:network")
    # A misspelt package is guessed at, what a module of one's own lacks is not.
    (tmp_path / "vision.py").write_text("import torchvisions")
    with pytest.raises(UserError, match=r"cannot import vision \(No module named 'torchvisions'\)"):
        student("vision:network")


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("architecture", ["torchvision:shufflenet_v2_x0_5", "timm:test_resnet.r160_in1k"])
def test_published_networks_take_state_dicts_of_training_scripts(architecture: str, kind: str, tmp_path: Path) -> None:
    if architecture.startswith("timm"):
        pytest.importorskip("timm")
        architecture = architecture.partition(".")[0]
    three = {"channels": 3, "size": 32}
    source, path = student(architecture, teacher=three, seed=1), tmp_path / f"weights.{kind}"
    state = {f"module.{key}": value for key, value in source.model.state_dict().items()}
    if kind == "pth":
        torch.save({"epoch": 1, "state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    recipe = teacher_recipe(architecture=architecture, options={}, weights=str(path), **three)
    teacher = build_classifier(recipe, recipe, field="teacher")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), source.eval()(images))
    with BatchNormTaps(teacher.model) as taps:
        teacher(images)
        assert len(taps.inputs) == sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in teacher.modules())


@pytest.mark.parametrize(
    ("architecture", "option"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("timm:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"in_chans": 1}),
    ],
)
def test_options_do_not_fetch_weights_or_change_channels(architecture: str, option: dict[str, Any]) -> None:
    if architecture.startswith("timm"):
        pytest.importorskip("timm")
    (name,) = option
    with pytest.raises(UserError, match=rf"student.options.{name}: teacher.channels, teacher.classes and student.weig"):
        student(architecture, options=option, teacher={"channels": 3, "size": 32})


def test_a_compiled_network_of_a_factory_is_tapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiled_networks.py").write_text(
        "import torch\n"
        "from diffdfkd.engine.architectures import small_cnn\n"
        "def fast(channels, classes): return torch.compile(small_cnn(channels, classes, width=2))\n"
    )
    monkeypatch.chdir(tmp_path)
    plain, path = student(options={"width": 2}), tmp_path / "weights.pth"
    torch.save(torch.compile(plain.model).state_dict(), path)
    recipe = teacher_recipe(architecture="compiled_networks:fast", options={}, weights=str(path))
    teacher = build_classifier(recipe, recipe, field="teacher")
    images = torch.rand(2, 1, 16, 16)
    with BatchNormTaps(teacher.model) as taps:
        torch.testing.assert_close(teacher(images), plain.eval()(images))
        assert len(taps.inputs) == 8


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"timm:resnet18 needs timm; pip install 'diffdfkd\[timm\]'"):
        student("timm:resnet18")


def test_unknown_architectures_and_options_get_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"student.architecture: no architecture smal_cnn \(did you mean small_cnn\?\)"):
        student("smal_cnn")
    with pytest.raises(UserError, match=r"student.options.widht: unknown option; allowed: width, blocks"):
        student(options={"widht": 3})
    with pytest.raises(UserError, match=r"student.options.width: got 0"):
        student(options={"width": 0})
