import json

import pytest
import torch
from torch import Tensor

from diffdfkd.engine.recall import compare_sets, covered
from diffdfkd.engine.reference import spread


def plain_covered(points: Tensor, manifold: Tensor, k: int) -> float:
    """The definition, point by point (Kynkaanniemi et al. 2019, equations 1 and 2)."""
    hits = 0
    for point in points:
        for index, centre in enumerate(manifold):
            others = sorted((centre - other).norm().item() for place, other in enumerate(manifold) if place != index)
            if (point - centre).norm().item() <= others[k - 1]:
                hits += 1
                break
    return hits / len(points)


def line(*places: float) -> Tensor:
    return torch.tensor(places)[:, None]


def test_on_a_line_the_shares_are_known() -> None:
    # Radii to the third neighbour of 0, 1, 2, 3, 4, 5: 3, 2, 2, 2, 2, 3; so the manifold reaches from -3 to 8.
    manifold = line(0, 1, 2, 3, 4, 5)
    points = line(-3.01, -3, -1, 2.5, 8, 8.01, 20, 4)
    assert covered(points, manifold) == 5 / 8
    assert covered(manifold, manifold) == 1
    # With one neighbour each ball has radius 1, and two clusters far apart leave a gap.
    assert covered(line(-1, 2.5, 6, 6.01, 50, 99, 150), line(0, 1, 2, 3, 4, 5, 100, 101), 1) == 4 / 7


def test_half_of_two_modes_dropped_is_a_recall_of_a_half_at_full_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(60, 2, generator=generator)
    both = torch.cat([left[:30], torch.rand(30, 2, generator=generator) + 100])
    assert covered(both[30:], left[30:]) == 0
    one_mode = left[30:]
    assert covered(both, one_mode) == pytest.approx(0.5, abs=0.05) and covered(both, one_mode) <= 0.5
    assert covered(one_mode, both) > 0.9


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_matrix_says_what_the_definition_says(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    points, manifold = (torch.randn(n, 3, generator=generator).double() for n in (40, 25))
    share = covered(points + 0.7, manifold, k)
    assert 0 < share < 1 and share == plain_covered(points + 0.7, manifold, k)


def test_sets_are_compared_by_halves_beside_the_unguided_ones_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    unguided = torch.randn(40, 4, generator=generator)
    guided = torch.randn(40, 4, generator=generator) * 0.5
    found = compare_sets(guided, labels, unguided, labels, 3, "logits")
    recall = (covered(unguided[:20], guided[:20]) + covered(unguided[20:], guided[20:])) / 2
    precision = (covered(guided[:20], unguided[:20]) + covered(guided[20:], unguided[20:])) / 2
    alike = (covered(unguided[:20], unguided[20:]) + covered(unguided[20:], unguided[:20])) / 2
    assert (found["recall"], found["precision"], found["unguided"]) == tuple(
        round(value, 4) for value in (recall, precision, alike)
    )
    assert found["recall"] < found["unguided"] < found["precision"]

    def mean_distance(features: Tensor, label: int) -> float:
        own = features[labels == label]
        distances = (own[:, None] - own).norm(dim=2)
        return distances.sum().item() / (len(own) * (len(own) - 1))

    own, other = (sum(mean_distance(features, label) for label in (0, 1)) / 2 for features in (guided, unguided))
    distance = found["intra_class_distance"]
    assert distance["share"] == pytest.approx(own / other, abs=1e-3)
    assert (distance["guided"], distance["unguided"]) == (pytest.approx(own, abs=1e-3), pytest.approx(other, abs=1e-3))
    assert found == json.loads(json.dumps(found)) and "sets of 20" in found["measure"]
    # A class with one image in one of the sets says nothing.
    alone = compare_sets(guided[:10], labels[:10] + torch.arange(10), unguided[:10], labels[:10], 12, "logits")
    assert alone["intra_class_distance"] == {"guided": None, "unguided": None, "share": None}


@pytest.mark.parametrize(("images", "count", "classes"), [(2000, 200, 10), (1000, 60, 10), (97, 24, 4), (160, 16, 100)])
def test_compared_images_are_spread_over_the_run_in_whole_sets_of_classes(
    images: int, count: int, classes: int
) -> None:
    chosen = spread(images, count, classes)
    assert len(chosen) == len(set(chosen)) == count and max(chosen) < images
    if classes <= count:
        for half in (chosen[: count // 2], chosen[count // 2 :]):
            assert [index % classes for index in half] == [*range(classes)] * (count // 2 // classes)
            assert max(half) - min(half) > images / 2
