import json

import pytest
import torch

from diffdfkd.engine.diversity import COMPARED_AT_ONCE, compare, measure_diversity, thumbnails
from diffdfkd.engine.tar_images import UNLABELLED


class Given:
    """Images in memory, which remember what was read."""

    classes = None

    def __init__(self, images, labels):
        self.images, self.labels, self.asked = images, torch.as_tensor(labels), []

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        self.asked += list(indices)
        return self.images[list(indices)], self.labels[list(indices)]


def noise(count, channels=1, size=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def test_unrelated_images_are_1_41_apart_and_negatives_2():
    images = noise(40, size=16)
    found = measure_diversity(Given(images, [0] * 40), 1)
    assert found["intra_class_distance"]["mean"] == pytest.approx(2**0.5, abs=0.01)
    pair = torch.stack([images[0], 255 - images[0]])
    assert measure_diversity(Given(pair, [0, 0]), 1)["intra_class_distance"]["mean"] == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_do_not_count(channels):
    image = noise(1, channels, 32)
    paler = (image.float() * 0.5 + 60).round().to(torch.uint8)
    assert (thumbnails(image) - thumbnails(paler)).norm() < 0.02


def test_near_duplicates_are_found_and_named_by_their_index():
    images = noise(60)
    images[50] = images[7]
    images[51] = (images[8].float() + 3).clamp(max=255).to(torch.uint8)  # another class, a little lighter
    found = measure_diversity(Given(images, [0] * 30 + [1] * 30), 2)
    near = found["near_duplicates"]
    assert near["examples"] == [[7, 50], [8, 51]]
    assert (near["count"], near["share"]) == (4, round(4 / 60, 4))
    assert not measure_diversity(Given(noise(60), [0] * 60), 1)["near_duplicates"]["count"]


def test_classes_with_no_or_one_image_have_no_distance_and_do_not_count_in_the_mean():
    images = noise(5, size=16)
    images[1] = images[0]
    found = measure_diversity(Given(images, [0, 0, 1, 3, 3]), 4)
    per_class = found["intra_class_distance"]["per_class"]
    assert per_class[0] == pytest.approx(0, abs=2e-3) and per_class[1] is None and per_class[2] is None
    assert found["intra_class_distance"]["mean"] == pytest.approx((per_class[0] + per_class[3]) / 2, abs=1e-4)
    alone = measure_diversity(Given(images[:1], [2]), 4)
    assert alone["intra_class_distance"] == {"mean": None, "per_class": [None] * 4}
    assert alone["near_duplicates"] == {"count": 0, "share": 0, "examples": []}


def test_nothing_to_look_at():
    found = measure_diversity(Given(noise(0), []), 2)
    assert found["images"] == 0 and found["near_duplicates"]["share"] is None


def test_images_without_a_label_count_for_near_duplicates_alone():
    images = noise(6)
    images[5] = images[0]
    found = measure_diversity(Given(images, [UNLABELLED] * 6), 2)
    assert found["intra_class_distance"] == {"mean": None, "per_class": [None, None]}
    assert found["unlabelled"] == 6 and found["near_duplicates"]["examples"] == [[0, 5]]


def test_blank_images_are_duplicates_of_one_another():
    images = torch.cat([torch.full((2, 1, 28, 28), 255, dtype=torch.uint8), noise(3)])
    assert measure_diversity(Given(images, [0] * 5), 1)["near_duplicates"]["examples"] == [[0, 1]]


def test_a_spread_of_many_images_is_read_once_and_gives_json():
    source = Given(noise(500, size=8), [i % 5 for i in range(500)])
    found = measure_diversity(source, 5, limit=100)
    assert source.asked == list(range(0, 500, 5)) and found["images"] == 100
    source.images[25] = source.images[10]
    assert measure_diversity(source, 5, limit=100)["near_duplicates"]["examples"] == [[10, 25]]
    assert found == json.loads(json.dumps(found)) == measure_diversity(Given(noise(500, size=8), source.labels), 5, 100)


@pytest.mark.parametrize("count", [COMPARED_AT_ONCE - 1, COMPARED_AT_ONCE, 3 * COMPARED_AT_ONCE + 5])
def test_blocks_of_rows_say_what_the_whole_matrix_says(count):
    small = thumbnails(noise(count, size=16)).double()
    small[count - 1] = small[0]  # nearly: in another block
    labels = torch.arange(count) % 4 - 1  # a quarter without a label
    distances = (small[:, None] - small).norm(dim=2)
    off_diagonal = ~torch.eye(count, dtype=torch.bool)
    found = compare(small.float(), labels, 3)
    for label in range(3):
        among = (labels == label)[:, None] & (labels == label) & off_diagonal
        assert found.by_class[label] == pytest.approx(distances[among].mean().item(), rel=1e-5)
    assert (found.twins, found.doubled) == ([(0, count - 1)], 2)
