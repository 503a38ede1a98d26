from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import StudentRecipe, TeacherRecipe
from diffdfkd.engine.weight_selection import select_weights
from diffdfkd.engine.weights import save_classifier

CLASSES = ["a", "b", "c"]
IMAGE = (3, 16, 16)


class Flattening(nn.Module):
    """Two convolutions whose 4x4 images are flattened, as in many small teachers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1))
        self.head = nn.Sequential(nn.Linear(2 * width * 16, hidden), nn.ReLU(), nn.Linear(hidden, len(CLASSES)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).relu().flatten(1))


def network(architecture: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = ARCHITECTURES[architecture](3, len(CLASSES), **options)
    return moved(model)


def moved(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and shifts that are not those of a new network."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert value is not None
                value.data.uniform_(0.5, 1.5)
    return model.eval()


def among_silent_channels(small: nn.Module, large: nn.Module, pixels: int = 16) -> nn.Module:
    """The small network's function in the large one: its channels at random places, all other weights nothing."""
    places: dict[tuple[int, int], Tensor] = {}

    def place(sizes: tuple[int, int]) -> Tensor:
        if sizes[0] == sizes[1]:
            return torch.arange(sizes[0])
        if sizes not in places:
            places[sizes] = torch.randperm(sizes[0], generator=torch.Generator().manual_seed(sum(sizes)))[: sizes[1]]
            places[sizes] = places[sizes].sort()[0]
        return places[sizes]

    wanted = large.state_dict()
    for name, value in small.state_dict().items():
        room = torch.ones_like(wanted[name]) if name.endswith("running_var") else torch.zeros_like(wanted[name])
        index = [place((room.shape[d], value.shape[d])) for d in range(min(2, value.ndim))]
        if isinstance(small, Flattening) and name == "head.0.weight":
            channels = place((room.shape[1] // pixels, value.shape[1] // pixels))
            index[1] = (channels[:, None] * pixels + torch.arange(pixels)).flatten()
        if not index:
            room = value.clone()
        elif len(index) == 1:
            room[index[0]] = value
        else:
            room[index[0][:, None], index[1]] = value
        wanted[name] = room
    large.load_state_dict(wanted)
    return large.eval()


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (lambda: network("small_cnn", width=5), lambda: network("small_cnn", width=8)),
        (lambda: network("resnet18", width=4), lambda: network("resnet18", width=9)),
        (lambda: moved(Flattening(4, 5)), lambda: moved(Flattening(7, 12))),
    ],
    ids=["chain", "residual", "flattening"],
)
def test_a_student_finds_itself_among_silent_channels(
    small: Callable[[], nn.Module], large: Callable[[], nn.Module]
) -> None:
    hidden = small()
    teacher = among_silent_channels(hidden, large())
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(images), hidden(images), rtol=1e-4, atol=1e-5)  # the test's own making
    student = small()
    for value in student.parameters():
        value.data.normal_()
    select_weights(student, teacher, IMAGE)
    for name, value in student.state_dict().items():
        assert torch.equal(value, hidden.state_dict()[name]), name


@pytest.mark.parametrize(
    ("architecture", "large", "small"),
    [
        ("vgg11", {"width": 8}, {"width": 4}),
        ("resnet34", {"width": 8}, {"width": 6}),
        ("mobilenet_v2", {"width": 0.5}, {"width": 0.25}),
    ],
)
def test_narrower_built_in_networks_are_parts_of_their_teachers(
    architecture: str, large: dict[str, Any], small: dict[str, Any]
) -> None:
    teacher, student = network(architecture, **large), network(architecture, **small)
    select_weights(student, teacher, (3, 32, 32))
    rows = {tuple(row.tolist()) for row in next(teacher.parameters()).flatten(1)}
    assert all(tuple(row.tolist()) in rows for row in next(student.parameters()).flatten(1))


def test_a_narrower_shufflenet_is_refused() -> None:
    with pytest.raises(UserError, match="no part of such a teacher"):
        select_weights(network("shufflenet_v2", width=0.5), network("shufflenet_v2"), (3, 32, 32))


def test_a_shortcut_that_the_teacher_does_not_have_is_noticed() -> None:
    # The first block of WRN-40-1 keeps its 16 channels and hands them on; that of WRN-40-2 convolves them.
    with pytest.raises(UserError, match="no part of such a teacher"):
        select_weights(network("wrn_40_1"), network("wrn_40_2"), (3, 32, 32))


@pytest.mark.parametrize(("deep", "shallow"), [("resnet34", "resnet18"), ("wrn_40_2", "wrn_16_2")])
def test_a_shallower_student_takes_the_first_layers_of_each_stage(deep: str, shallow: str) -> None:
    options: dict[str, Any] = {"width": 4} if deep == "resnet34" else {}
    teacher, student = network(deep, **options), network(shallow, **options)
    for value in student.parameters():
        value.data.zero_()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    select_weights(student, teacher, IMAGE)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class Plain(nn.Module):
    """Layers in a row, then the mean over space."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))


class Joined(nn.Module):
    """Two convolutions whose outputs are concatenated, as in DenseNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(3, width, 3)
        self.head = nn.Linear(2 * width, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(images), self.second(images)], 1).mean((2, 3)))


def grouped(width: int) -> nn.Module:
    return Plain(nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, groups=4), nn.Conv2d(width, len(CLASSES), 1))


def normalised(width: int) -> nn.Module:
    return Plain(nn.Conv2d(3, width, 3), nn.GroupNorm(1, width), nn.Conv2d(width, len(CLASSES), 1))


def attending(width: int, layers: int = 1) -> nn.Module:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv2d(3, width, 4, 4)
            layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, len(CLASSES))

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.layers(self.cut(images).flatten(2).transpose(1, 2)).mean(1))

    return Attending().eval()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (lambda: Joined(3), lambda: Joined(5)),
        (lambda: grouped(8), lambda: grouped(16)),
        (lambda: normalised(4), lambda: normalised(8)),
        (lambda: attending(8), lambda: attending(16)),
        (lambda: network("small_cnn", width=4, blocks=(1, 1, 1)), lambda: network("small_cnn", width=4)),
    ],
    ids=["concatenated", "groups", "normalised together", "attention", "a row of fewer layers"],
)
def test_channels_that_names_and_sizes_do_not_join_are_refused(
    student: Callable[[], nn.Module], teacher: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    small, large = student(), teacher()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(UserError, match=r"student.initialization: teacher, but .*random"):
        select_weights(small, large, IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_fewer_layers_of_attention_are_taken_as_they_are() -> None:
    student, teacher = attending(8, 1), attending(8, 3)
    select_weights(student, teacher, IMAGE)
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((nn.Conv2d(3, 3, 5),), r"1 of .* no counterpart .*\(layers.0.weight\)"),
        ((nn.Conv2d(3, 9, 3), nn.Conv2d(9, 3, 3)), r"3 of .*\(layers.0.weight, layers.0.bias, layers.1.weight\)"),
    ],
)
def test_weights_without_a_counterpart_are_named(layers: tuple[nn.Module, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        select_weights(Plain(*layers), Plain(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)), IMAGE)


def test_weights_decide_and_not_their_scale() -> None:
    teacher = Plain(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False))
    student = Plain(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        first, last = teacher.parameters()
        first.copy_(torch.tensor([0.1, 0.2, 0.9])[:, None, None, None].expand_as(first))
        last.copy_(1000 * torch.tensor([0.9, 0.3, 0.1])[None, :, None, None])
    select_weights(student, teacher, IMAGE)
    assert torch.equal(next(student.parameters()), first[[0, 2]])


def recipe(**changes: Any) -> StudentRecipe:
    fields = {"architecture": "small_cnn", "options": {"width": 3}, "initialization": "teacher"}
    return StudentRecipe.model_validate({**fields, **changes})


@pytest.fixture(name="teacher")
def _teacher(tmp_path: Path) -> TeacherRecipe:
    made = TeacherRecipe(architecture="small_cnn", options={"width": 6}, classes=CLASSES, size=16)
    built = build_classifier(
        StudentRecipe(**made.model_dump(include={"architecture", "options"})), made, field="student"
    )
    moved(built.model)
    save_classifier(built, tmp_path / "teacher.safetensors", {})
    return made.model_copy(update={"weights": str(tmp_path / "teacher.safetensors")})


def test_a_student_is_built_with_its_teachers_weights(teacher: TeacherRecipe) -> None:
    trained = build_classifier(teacher, teacher, field="teacher").model
    built = [build_classifier(recipe(), teacher, field="student", seed=seed).model for seed in (0, 1)]
    for name, value in built[0].state_dict().items():
        assert torch.equal(value, built[1].state_dict()[name])  # of no seed
    statistics = built[0].state_dict()["features.0.1.running_mean"]
    assert set(statistics.tolist()) <= set(trained.state_dict()["features.0.1.running_mean"].tolist())
    assert all(value.requires_grad for value in built[0].parameters())
    scratch = build_classifier(recipe(initialization="random"), teacher, field="student", seed=0).model
    assert not torch.equal(scratch.state_dict()["head.weight"], built[0].state_dict()["head.weight"])


def test_a_student_that_exists_is_left_alone(teacher: TeacherRecipe) -> None:
    absent = teacher.model_copy(update={"weights": "/nowhere"})
    build_classifier(recipe(), absent, field="student")
    with pytest.raises(UserError, match=r"teacher.weights: /nowhere"):
        build_classifier(recipe(), absent, field="student", seed=0)


def test_a_student_of_another_family_is_refused(teacher: TeacherRecipe) -> None:
    for other in ({"architecture": "resnet18", "options": {"width": 4}}, {"options": {"width": 9}}):
        with pytest.raises(UserError, match=r"student.initialization: .* no counterpart .*random"):
            build_classifier(recipe(**other), teacher, field="student", seed=0)


def test_a_teacher_that_is_there_is_not_read_again(teacher: TeacherRecipe) -> None:
    trained = build_classifier(teacher, teacher, field="teacher")
    Path(str(teacher.weights)).unlink()
    built = build_classifier(recipe(), teacher, field="student", seed=0, trained=trained)
    assert torch.equal(built.model.state_dict()["head.bias"], trained.model.state_dict()["head.bias"])
