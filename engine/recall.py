"""How much of the prior's own variety guided images keep: k-NN precision and recall, distance within a class.

Kynkaanniemi et al. 2019 (arXiv 1904.06991, section 3): a set's manifold is the union of balls around its points, each
as large as the distance to the point's k-th nearest neighbour in the set. Recall is the share of the reference's points
that lie in the manifold of the generated ones, precision the share of generated points in that of the reference.
"""

from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.diversity import compare

NEIGHBOURS = 3
MEASURE = (
    "on the teacher's {features}: recall is the share of the prior's unguided images that lie among the guided ones, "
    f"precision the share of guided images that lie among unguided ones (k-NN, k = {NEIGHBOURS}, sets of {{size}}); "
    "two such sets of unguided images give the figure beside them"
)


def covered(points: Tensor, manifold: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of `points` [N, D] that lie in a ball around one of `manifold` [M, D], M above `neighbours`."""
    points, manifold = points.double(), manifold.double()
    exact = "donot_use_mm_for_euclid_dist"
    among = torch.cdist(manifold, manifold, compute_mode=exact).fill_diagonal_(torch.inf)
    radii = among.kthvalue(neighbours, dim=1).values
    return (torch.cdist(points, manifold, compute_mode=exact) <= radii).any(1).double().mean().item()


def compare_sets(
    guided: Tensor, guided_labels: Tensor, unguided: Tensor, unguided_labels: Tensor, classes: int, features: str
) -> dict[str, Any]:
    """Features [N, D] and labels [N] of guided images beside those [M, D] of unguided ones, JSON-ready.

    Of each set the first half and the second are taken apart: halves of guided images are compared with halves of
    unguided ones, and the two unguided halves with each other (``unguided``), which says what `recall` and `precision`
    would be of images that guidance had not changed. `intra_class_distance` has the mean distance between two images
    of a class, over the classes that have two images in both sets, and `share`, guided as a part of unguided.
    """
    ours, theirs = ((few[: len(few) // 2], few[len(few) // 2 :]) for few in (guided, unguided))
    recall = [covered(theirs[half], ours[half]) for half in (0, 1)]
    precision = [covered(ours[half], theirs[half]) for half in (0, 1)]
    alike = [covered(theirs[half], theirs[1 - half]) for half in (0, 1)]
    return {
        "features": features,
        "neighbours": NEIGHBOURS,
        "images": len(guided),
        "recall": _mean(recall),
        "precision": _mean(precision),
        "unguided": _mean(alike),
        "intra_class_distance": _distances(guided, guided_labels, unguided, unguided_labels, classes),
        "measure": MEASURE.format(features=features, size=len(ours[0])),
    }


def _distances(
    guided: Tensor, guided_labels: Tensor, unguided: Tensor, unguided_labels: Tensor, classes: int
) -> dict[str, float | None]:
    ours = compare(guided, guided_labels, classes).by_class
    theirs = compare(unguided, unguided_labels, classes).by_class
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not both:
        return {"guided": None, "unguided": None, "share": None}
    own, other = (sum(values) / len(both) for values in zip(*both, strict=True))
    # Features have any scale: digits count, and not decimals.
    figures = {"guided": own, "unguided": other, "share": own / other if other else None}
    return {name: None if value is None else float(f"{value:.4g}") for name, value in figures.items()}


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)
