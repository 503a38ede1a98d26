"""How different the images of a class are from one another, and which are nearly the same image twice.

Nothing of a teacher is asked: images are compared as thumbnails, so that the figure says the same for every run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffdfkd.engine.images import Images
from diffdfkd.engine.tar_images import UNLABELLED

EDGE = 16
NEAR = 0.1
"""Distance below which two images are nearly the same; two thumbnails at it correlate at 0.995."""
EXAMPLES = 12
READ_AT_ONCE = 32
COMPARED_AT_ONCE = 128
"""Rows of the matrix of distances: all of its rows would be the highest memory of a small run."""
MEASURE = (
    f"L2 distance between {EDGE}x{EDGE} thumbnails, each less its mean and scaled to length 1: 0 for one image twice, "
    f"1.41 for unrelated ones, 2 for negatives; below {NEAR} two images count as near-duplicates"
)


@dataclass(frozen=True)
class Diversity:
    """Of N images."""

    by_class: list[float | None]
    """Mean distance between two images of a class; None where it has fewer than two."""
    twins: list[tuple[int, int]]
    """Pairs of near-duplicates (of any class), closest first; each image with its closest one."""
    doubled: int
    """Images that have a near-duplicate."""

    @property
    def mean(self) -> float | None:
        """Over the classes with two images or more, each counting the same."""
        known = [distance for distance in self.by_class if distance is not None]
        return sum(known) / len(known) if known else None


def thumbnails(images: Tensor) -> Tensor:
    """Images [N, C, H, W], uint8 or in [0, 1], to [N, C * 256] float32 of length 1; 0 for an image of one colour."""
    scale = 255 if images.dtype == torch.uint8 else 1
    small = functional.adaptive_avg_pool2d(images.float() / scale, EDGE).flatten(1)
    small = small - small.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(small, dim=1, keepdim=True)
    # Rounding alone makes the thumbnail of one colour a little longer than 0.
    return torch.where(length > 1e-4, small / length, 0)


def compare(small: Tensor, labels: Tensor, n_classes: int) -> Diversity:
    """Of thumbnails [N, D] with labels [N] int64; those without a label count for near-duplicates alone."""
    lengths = small.square().sum(1)
    to_class, closest = small.new_zeros(len(small)), small.new_zeros(len(small))
    partner = torch.zeros(len(small), dtype=torch.int64)
    for first in range(0, len(small), COMPARED_AT_ONCE):
        rows = slice(first, first + COMPARED_AT_ONCE)
        distances = (lengths[rows, None] + lengths - 2 * small[rows] @ small.T).clamp_(min=0).sqrt_()  # [R, N]
        itself = distances.diagonal(first)
        itself.fill_(0)  # as it is but for rounding
        to_class[rows] = (distances * (labels[rows, None] == labels)).sum(1)
        itself.fill_(torch.inf)
        closest[rows], partner[rows] = distances.min(1)
    by_class: list[float | None] = []
    for label in range(n_classes):
        among = to_class[labels == label]
        pairs = len(among) * (len(among) - 1)
        by_class.append(among.sum().item() / pairs if pairs else None)
    near = (closest < NEAR).nonzero().flatten().tolist()
    pairs_found = {(min(i, j), max(i, j)): float(closest[i]) for i in near for j in [int(partner[i])]}
    twins = sorted(pairs_found, key=lambda pair: (pairs_found[pair], pair))
    return Diversity(by_class, twins, len(near))


def measure_diversity(images: Images, n_classes: int, limit: int = 2000) -> dict[str, Any]:
    """Diversity of at most ``limit`` images, evenly spread over their source, JSON-ready.

    ``intra_class_distance`` has ``mean`` and ``per_class`` (None for a class with fewer than two of them);
    ``near_duplicates`` has ``count`` and ``share`` of the images that have one, and ``examples``, pairs of indices into
    ``images``, closest first; ``images`` is how many were looked at, ``unlabelled`` how many of those have no label,
    ``measure`` says what the distance is.
    """
    count = min(len(images), limit)
    indices = [index * len(images) // count for index in range(count)]
    small, labels = torch.zeros(0, 1), torch.zeros(count, dtype=torch.int64)
    for first in range(0, count, READ_AT_ONCE):
        rows = slice(first, first + READ_AT_ONCE)
        pixels, labels[rows] = images.read(indices[rows])
        few = thumbnails(pixels)
        # One place for all: small tensors kept between the large ones that come and go would scatter the heap.
        if not len(small):
            small = few.new_empty(count, few.shape[1])
        small[rows] = few
    found = compare(small, labels, n_classes)
    return {
        "intra_class_distance": {
            "mean": _round(found.mean),
            "per_class": [_round(distance) for distance in found.by_class],
        },
        "near_duplicates": {
            "count": found.doubled,
            "share": _round(found.doubled / count) if count else None,
            "examples": [[indices[i], indices[j]] for i, j in found.twins[:EXAMPLES]],
        },
        "images": count,
        "unlabelled": int((labels == UNLABELLED).sum()),
        "measure": MEASURE,
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
