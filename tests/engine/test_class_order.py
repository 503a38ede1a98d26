import itertools

import numpy as np
import pytest
import torch

from diffdfkd.engine.class_order import assign, better_order

NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def answers(skill, asked, classes, seed=0, favourite=0.3):
    """Probabilities [N, classes] of a teacher that is right on a share of the images, with a favourite otherwise."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(asked), classes, generator=generator)
    scores[:, classes // 2] += 3 * (torch.rand(len(asked), generator=generator) < favourite)
    right = torch.rand(len(asked), generator=generator) < skill
    scores[torch.arange(len(asked)), asked] += 6 * right
    return scores.softmax(1)


def test_assignment_is_the_best_there_is():
    generator = np.random.default_rng(0)
    for _ in range(200):
        rows = int(generator.integers(1, 6))
        gain = generator.normal(size=(rows, int(generator.integers(rows, 7)))).round(1)
        columns = assign(gain)
        best = max(sum(gain[i, c] for i, c in enumerate(p)) for p in itertools.permutations(range(gain.shape[1]), rows))
        assert len(set(columns)) == rows
        assert sum(gain[i, c] for i, c in enumerate(columns)) == pytest.approx(best)


@pytest.mark.parametrize("skill", [0.0, 0.1, 0.35, 0.95])
@pytest.mark.parametrize("seed", range(8))
def test_the_right_order_is_not_accused_whatever_the_teacher_knows(skill, seed):
    asked = torch.arange(100) % 10
    assert better_order(answers(skill, asked, 10, seed), asked, NAMES) is None


def test_an_order_that_is_right_a_few_times_more_often_is_not_named():
    asked = torch.arange(100) % 10
    outputs = (asked + 1) % 10
    spread = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    certain = torch.full((100, 10), 0.1)
    # 20 answers speak for an order moved by one, 6 for the declared one: 2.9 standard errors; the rest for nothing.
    for members, said in ((spread[:20], outputs), (spread[20:26], asked)):
        certain[members] = torch.nn.functional.one_hot(said[members], 10).float()
    assert better_order(certain, asked, NAMES) is None


@pytest.mark.parametrize(("skill", "seed"), [(0.45, 0), (0.45, 1), (0.95, 2)])
def test_a_permuted_order_is_found(skill, seed):
    outputs = torch.from_numpy(np.random.default_rng(seed).permutation(10))
    asked = torch.arange(100) % 10  # in the declared order; class k really is output outputs[k]
    found = better_order(answers(skill, outputs[asked], 10, seed), asked, NAMES)
    assert found is not None and found.agreement > 2 * found.declared
    agreed = sum(found.output[label] == int(outputs[label]) for label in range(10))
    assert agreed >= (10 if skill > 0.9 else 8)


def test_the_alphabetical_order_is_named():
    asked = torch.arange(60) % 10
    outputs = torch.tensor([sorted(NAMES).index(name) for name in NAMES])
    found = better_order(answers(0.9, outputs[asked], 10), asked, NAMES)
    assert found.name == "alphabetical" and found.output == dict(enumerate(outputs.tolist()))


def test_an_output_for_nothing_in_front_is_named():
    asked = torch.arange(60) % 10
    found = better_order(answers(0.9, (asked + 1) % 10, 10), asked, NAMES)
    assert found.name in ("moved on by one", "moved back by one") and found.output[3] == 4


def test_two_classes_exchanged_are_found_where_the_teacher_is_sure_and_only_there():
    asked = torch.arange(200) % 10
    outputs = torch.tensor([0, 1, 2, 5, 4, 3, 6, 7, 8, 9])
    found = better_order(answers(0.95, outputs[asked], 10), asked, NAMES)
    assert {label: output for label, output in found.output.items() if label != output} == {3: 5, 5: 3}
    # Judged by these two alone, which the teacher names wrong throughout.
    assert found.declared < 0.1 and found.agreement > 0.8
    # Cats and dogs that are taken for one another less than half of the time, and else for birds, are no such thing.
    confused = asked.clone()
    for own, other in ((3, 5), (5, 3)):
        members = (asked == own).nonzero().flatten()
        confused[members[:9]], confused[members[9:]] = other, 2
    assert better_order(answers(0.95, confused, 10), asked, NAMES) is None


def test_some_classes_of_many():
    names = [f"class {k:03d}" for k in range(345)]
    drawn = torch.arange(20) * 345 // 20
    asked = drawn.repeat(5)
    assert better_order(answers(0.8, asked, 345), asked, names) is None
    found = better_order(answers(0.8, (asked * 7 + 3) % 345, 345), asked, names)
    assert set(found.output) == set(drawn.tolist()) and found.output[17] == (17 * 7 + 3) % 345
