import json

import pytest
import torch

from diffdfkd.engine.specification import Port, Specification

F32 = torch.float32
SAMPLE, ALIVE = Port("sample", (6, 4, 8), F32), Port("alive", (6,), torch.bool)
SCALE = Port("scale", (3,), F32, batched=False)
OUTPUT, MEAN = Port("output", (6, 4), F32), Port("mean", (), F32, batched=False)


def specify(least=None, most=None):
    return Specification("stage", (SCALE, SAMPLE, ALIVE), (OUTPUT, MEAN), least, most)


def inputs(rows=6):
    return [torch.zeros(3), torch.zeros(rows, 4, 8), torch.zeros(rows, dtype=torch.bool)]


def test_port_at_a_batch():
    assert SAMPLE.shape_at(2) == (2, 4, 8)
    assert SCALE.shape_at(2) == (3,)
    assert MEAN.shape_at(2) == ()


@pytest.mark.parametrize(
    ("least", "most", "expected", "static"),
    [
        (None, None, (6, 6, 6), True),
        (6, 6, (6, 6, 6), True),
        (1, None, (1, 6, 6), False),
        (None, 9, (6, 6, 9), False),
        (2, 9, (2, 6, 9), False),
    ],
)
def test_range(least, most, expected, static):
    specification = specify(least, most)
    assert (specification.range, specification.rows, specification.static) == (expected, 6, static)


@pytest.mark.parametrize(("least", "most"), [(0, None), (-1, 9), (7, None), (None, 5), (7, 9), (9, 1)])
def test_range_that_does_not_ascend(least, most):
    with pytest.raises(ValueError, match=r"^stage: batches from .* ascending ones expected$"):
        specify(least, most)


@pytest.mark.parametrize(
    ("given", "made", "said"),
    [
        ((SAMPLE, SAMPLE), (OUTPUT,), "two ports have one name"),
        ((SAMPLE,), (OUTPUT._replace(name="sample"),), "two ports have one name"),
        ((SAMPLE,), (OUTPUT._replace(shape=(5, 4)),), r"batches of \[5, 6\] rows"),
        ((SCALE,), (MEAN,), r"batches of \[\] rows"),
        ((SCALE,), (OUTPUT,), r"batches of \[6\] rows; one, of an input, expected"),
        ((SAMPLE,), (Port("mean", (), F32),), "batched=False expected"),
    ],
)
def test_specification_without_one_batch(given, made, said):
    with pytest.raises(ValueError, match=said):
        Specification("stage", given, made)


def test_rows_of_a_call():
    assert specify().rows_of(inputs()) == 6
    assert specify().rows_of(inputs(1)) == 1  # padded by the runner
    assert specify(2, 9).rows_of(inputs(9)) == 9


def wrong(place, value):
    given = inputs()
    given[place] = value
    return given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (inputs()[:2], "got 2 inputs; it takes scale, sample, alive"),
        (inputs(0), "an empty batch"),
        (inputs(7), "a batch of 7 rows is more than this engine was built for, 6; give smaller batches"),
        (wrong(0, torch.zeros(6)), r"scale is torch.float32 \[6\]; torch.float32 \[3\] expected"),
        (wrong(1, torch.zeros(6, 4, 7)), r"sample is torch.float32 \[6, 4, 7\]; torch.float32 \[6, 4, 8\] expected"),
        (wrong(1, torch.zeros(())), r"sample is torch.float32 \[\]; torch.float32 \[1, 4, 8\] expected"),
        (wrong(1, torch.zeros(6, 4, 8).half()), "sample is torch.float16"),
        (wrong(2, torch.zeros(5, dtype=torch.bool)), r"alive is torch.bool \[5\]; torch.bool \[6\] expected"),
        (wrong(2, torch.zeros(6)), r"alive is torch.float32"),
    ],
)
def test_call_that_does_not_fit_names_the_port(given, said):
    with pytest.raises(ValueError, match=f"^stage: {said}"):
        specify().rows_of(given)


def test_description_is_json_and_tells_apart():
    described = specify(2, 9).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["batches"] == [2, 6, 9]
    assert described["inputs"][2] == {"name": "alive", "dtype": "bool", "shape": [6], "batched": True}
    others = [specify(2, 8), specify(), Specification("stage", (SCALE, SAMPLE), (OUTPUT, MEAN), 2, 9)]
    assert all(other.describe() != described for other in others)
