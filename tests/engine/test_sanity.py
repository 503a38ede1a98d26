from dataclasses import replace

import pytest
import torch
from torch import nn

from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.sanity import (
    CLEARLY,
    NORMALISATIONS,
    Hypothesis,
    Reading,
    beyond_chance,
    hypotheses,
    judge,
    layer_distance,
    preference,
    read,
    statistics_distance,
    unrecognised,
)
from diffdfkd.engine.signs import Layer, Look

IMAGENET = NORMALISATIONS[3]["ImageNet's mean and std"]


def pictures(count=60, channels=3, size=24, seed=0, levels=(0.75, 0.45, 0.2)):
    """Smooth patches, uint8: in colour reddish, in grey light shapes on black."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    if channels == 1:
        return ((smooth - 0.5).clamp(min=0) * 2 * 255).to(torch.uint8)
    level = torch.tensor(levels)[:, None, None]
    return ((level + 0.5 * (smooth - 0.5)).clamp(0, 1) * 255).to(torch.uint8)


def make_teacher(preprocessing, images, *, batchnorm=True, classes=4):
    """Random filters whose BatchNorm layers remember the images, preprocessed so; an answer that no one asks for."""

    def normalise(width):
        return nn.BatchNorm2d(width, momentum=None) if batchnorm else nn.GroupNorm(2, width)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            *(nn.Conv2d(preprocessing.channels, 16, 3, padding=1), normalise(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, stride=2), normalise(24), nn.ReLU()),
            *(nn.Conv2d(24, 32, 3, stride=2), normalise(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)),
        )
    classifier = Classifier(model, preprocessing, [str(k) for k in range(classes)])
    with torch.no_grad():
        classifier.train()(images.float() / 255)
    return classifier.requires_grad_(False).eval()


def declare(teacher, **fields):
    """The same teacher, of which the recipe says otherwise."""
    return Classifier(teacher.model, replace(teacher.preprocessing, **fields), teacher.classes).eval()


def verdict(teacher, images, asked=None, native=24):
    readings = [read(teacher, hypothesis, images, asked) for hypothesis in hypotheses(teacher.preprocessing, native)]
    return judge([reading for reading in readings if reading is not None])


TRUE = Preprocessing(3, 24, *IMAGENET, "bilinear")


@pytest.fixture(scope="module")
def colour_teacher():
    return make_teacher(TRUE, pictures(200, seed=1))


def test_a_teacher_declared_as_it_was_trained_is_not_accused(colour_teacher):
    assert verdict(colour_teacher, pictures()) is None
    # Nor for images that are somewhat darker, or flatter, than those it was trained on.
    darker = (pictures().float() * 0.85).to(torch.uint8)
    assert verdict(colour_teacher, darker) is None
    assert verdict(colour_teacher, pictures(levels=(0.65, 0.45, 0.25))) is None


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"channel_order": "bgr", "mean": IMAGENET[0][::-1], "std": IMAGENET[1][::-1]}, {"teacher.channel_order"}),
        ({"channel_order": "bgr"}, {"teacher.channel_order"}),
        ({"mean": (0.0,), "std": (1.0,)}, {"teacher.mean", "teacher.std"}),
        ({"mean": (0.0,), "std": (1 / 255,)}, {"teacher.mean", "teacher.std"}),
        ({"mean": (0.5,), "std": (0.5,), "channel_order": "bgr"}, {"teacher.mean", "teacher.channel_order"}),
    ],
)
def test_wrong_channel_order_value_range_and_normalisation_are_found_and_mended(colour_teacher, declared, expected):
    found = verdict(declare(colour_teacher, **declared), pictures())
    assert found is not None and found.by_statistics and found.ratio >= CLEARLY
    assert expected <= set(found.reading.hypothesis.changes)
    mended = found.reading.hypothesis.preprocessing
    values = torch.rand(2, 3, 24, 24)
    assert (mended(values) - TRUE(values)).abs().max() < 0.1
    fields = {name.removeprefix("teacher."): value for name, value in found.reading.hypothesis.changes.items()}
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()} == {
        name: pytest.approx(getattr(mended, name), abs=1e-6) if name != "channel_order" else mended.channel_order
        for name in fields
    }


def test_bgr_teachers_are_served_the_other_way_round(colour_teacher):
    theirs = replace(TRUE, channel_order="bgr", mean=IMAGENET[0][::-1], std=IMAGENET[1][::-1])
    teacher = make_teacher(theirs, pictures(200, seed=1))
    assert verdict(teacher, pictures()) is None
    found = verdict(declare(teacher, channel_order="rgb"), pictures())
    assert found.reading.hypothesis.changes["teacher.channel_order"] == "bgr"


def test_grey_that_is_inverted_is_found_where_no_field_would_mend_it():
    grey = Preprocessing(1, 24, (0.1307,), (0.3081,), "bilinear")
    teacher = make_teacher(grey, pictures(200, 1, seed=1))
    assert verdict(teacher, pictures(60, 1)) is None
    found = verdict(teacher, 255 - pictures(60, 1))
    assert found.reading.hypothesis.inverted and not found.reading.hypothesis.changes
    wrong = verdict(declare(teacher, mean=(0.0,), std=(1 / 255,)), pictures(60, 1))
    assert wrong.reading.hypothesis.changes == {"teacher.mean": [0.1307], "teacher.std": [0.3081]}


def test_a_wrong_size_is_found_and_one_that_a_network_refuses_is_passed_over():
    teacher = make_teacher(replace(TRUE, size=64), pictures(100, size=64, seed=1))
    found = verdict(declare(teacher, size=20), pictures(40, size=64), native=64)
    assert (
        set(found.reading.hypothesis.changes) == {"teacher.size"} and found.reading.hypothesis.preprocessing.size > 32
    )
    strict = make_teacher(TRUE, pictures(50))
    strict.model[9] = nn.Identity()
    strict.model[11] = nn.Linear(32 * 25, 4)
    tried = {hypothesis.name: read(strict, hypothesis, pictures(4), None) for hypothesis in hypotheses(TRUE, 24)}
    assert tried["32x32 pixels"] is None and tried["as declared"] is not None
    assert not any(name.startswith(("64", "128")) for name in tried)  # far larger than the images


def test_noise_accuses_no_teacher(colour_teacher):
    noise = torch.randint(0, 256, (60, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = torch.arange(60) % 4
    for fields in ({}, {"mean": (0.5,), "std": (0.5,)}, {"mean": (0.0,), "std": (1.0,)}):
        assert verdict(declare(colour_teacher, **fields), noise, asked) is None


class Bright(nn.Module):
    """Answers by which of the channels is brightest; no BatchNorm."""

    def forward(self, values):
        return 20 * values.mean((2, 3))


def test_without_batchnorm_the_answers_decide():
    generator = torch.Generator().manual_seed(0)
    asked = torch.arange(60) % 3
    values = torch.rand(60, 3, 8, 8, generator=generator) * 0.5
    values[torch.arange(60), asked] += 0.2
    images = (values * 255).to(torch.uint8)
    right = Classifier(Bright(), Preprocessing(3, 8, (0.5,), (0.5,), "bilinear"), ["a", "b", "c"])
    right.register_parameter("where", nn.Parameter(torch.zeros(1)))
    assert verdict(right, images, asked) is None
    wrong = Classifier(Bright(), replace(right.preprocessing, channel_order="bgr"), ["a", "b", "c"])
    wrong.register_parameter("where", nn.Parameter(torch.zeros(1)))
    found = verdict(wrong, images, asked)
    assert found.reading.hypothesis.changes == {"teacher.channel_order": "rgb"}
    assert found.ratio is None and not found.by_statistics and found.reading.agreement > 0.9


def layer(mean, variance, count=20):
    ones = torch.ones(count, dtype=torch.float64)
    return Layer("x", mean * ones, variance * ones, 0 * ones, ones)


def test_distance_is_in_standard_deviations_and_a_dead_channel_does_not_decide():
    assert layer_distance(layer(0, 1)) == pytest.approx(0, abs=1e-4)
    assert layer_distance(layer(3, 1)) == pytest.approx(3, rel=1e-3)
    assert layer_distance(layer(0, 4)) == pytest.approx(1, rel=1e-3)
    dead = layer(0, 4)
    dead.running_variance[3], dead.variance[3], dead.mean[3] = 0, 50, 7
    assert layer_distance(dead) == pytest.approx(1, rel=1e-3)
    # The first layer counts twice as much as the second.
    assert statistics_distance([layer(3, 1), layer(0, 1)]) == pytest.approx(2, rel=1e-3)
    assert statistics_distance([]) is None


def reading(distance, hits, name="other", changes=None):
    return Reading(
        Hypothesis(name, TRUE, {"teacher.mean": [0]} if changes is None else changes),
        Look(torch.full((len(hits), 10), 0.1), [layer(distance, 1)], None),
        torch.tensor(hits),
    )


def test_classes_that_are_named_no_better_than_by_chance():
    asked = torch.arange(4).repeat_interleave(10)
    # Of ten classes: 10, 3, 2 and no hits of ten, where chance gives 1 and two errors reach to 2.9.
    hits = [True] * 10 + [True] * 3 + [False] * 7 + [True] * 2 + [False] * 8 + [False] * 10
    assert unrecognised(reading(0.3, hits), asked) == [2, 3]


GOOD, HALF_GOOD, NONE = [True] * 40, [True, False] * 20, [False] * 38 + [True] * 2


@pytest.mark.parametrize(
    ("declared", "other", "accused"),
    [
        (reading(1.0, HALF_GOOD), reading(0.6, HALF_GOOD), True),  # 1.67 times nearer, recognised
        (reading(1.0, HALF_GOOD), reading(0.8, HALF_GOOD), False),  # 1.25 times: not clearly
        (reading(1.0, HALF_GOOD), reading(0.3, NONE), False),  # nearer, but it names the classes no more
        (reading(1.0, NONE), reading(0.6, NONE), False),  # nearer, but still far, and nothing is recognised
        (reading(1.0, NONE), reading(0.3, NONE), True),  # so near that no answers are needed
        (reading(1.0, NONE), reading(1.0, GOOD), True),  # answers alone
        (reading(0.5, NONE), reading(1.0, GOOD), False),  # against the statistics
    ],
)
def test_what_it_takes_to_accuse(declared, other, accused):
    assert (judge([declared, other]) is not None) == accused


def test_of_two_that_explain_as_much_the_one_with_fewer_changes_is_named():
    one = reading(0.31, GOOD, "one", {"teacher.std": [1]})
    two = reading(0.3, GOOD, "two", {"teacher.std": [1], "teacher.channel_order": "bgr"})
    assert judge([reading(1.0, GOOD), two, one]).reading.hypothesis.name == "one"


def test_chance_and_preference():
    assert not beyond_chance(torch.tensor(NONE), 10) and beyond_chance(torch.tensor(HALF_GOOD), 10)
    assert not beyond_chance(torch.tensor([True] * 3 + [False] * 97), 1000)  # too few to say
    assert preference(torch.tensor(GOOD), torch.tensor(GOOD)) == 0 == preference(None, None)
    assert preference(torch.tensor(GOOD), torch.tensor(HALF_GOOD)) == pytest.approx(20**0.5)


def test_hypotheses_begin_with_the_declared_and_leave_out_what_is_the_same():
    names = [hypothesis.name for hypothesis in hypotheses(TRUE, 24)]
    assert names[0] == "as declared" and len(names) == len(set(names))
    assert "ImageNet's mean and std" not in names and "channels bgr" in names
    assert "ImageNet's mean and std, channels bgr" not in names
    grey = [hypothesis.name for hypothesis in hypotheses(Preprocessing(1, 28, (0.2859,), (0.353,), "bilinear"), 32)]
    assert "Fashion-MNIST's mean and std" not in grey and "dark and light exchanged" in grey
    assert not any("bgr" in name for name in grey)
