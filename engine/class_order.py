"""Whether the class names are in the order of the teacher's outputs, from the classes asked for and those named."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.sanity import SIGNIFICANT, beyond_chance

MUCH_LESS = 0.6
"""Times the probability under another order, which that under the declared one must stay below."""
CERTAIN = 0.5
"""Least agreement with an assignment that leaves most classes in place: similar classes are taken for each other."""


@dataclass(frozen=True)
class Order:
    """An order of the classes that explains the teacher's answers clearly better than the declared one."""

    name: str
    output: dict[int, int]
    """Output that answers to a class, by the class's place in the declared order; of the classes asked for."""
    agreement: float
    """Share of the answers that are right under it; it was not chosen by these."""
    declared: float
    """The same under the declared order."""


def better_order(probabilities: Tensor, asked: Tensor, classes: Sequence[str]) -> Order | None:
    """From answers [N, K] to images of the classes asked for [N]; None where the declared order is not clearly worse.

    A free assignment is found on one half of the images and judged on the other, both ways round. Known orders
    (alphabetical, by number, moved by one) need nothing to be found; one that does about as well is named instead.
    """
    drawn = sorted(set(asked.tolist()))
    place = torch.zeros(len(asked), dtype=torch.int64)
    for label in drawn:
        own = (asked == label).nonzero().flatten()
        place[own] = torch.arange(len(own)) % 2
    wanted = asked.clone()
    for half in (0, 1):
        learned = _assigned(probabilities[place != half], asked[place != half])
        judged = place == half
        wanted[judged] = torch.tensor([learned.get(label, label) for label in asked[judged].tolist()])
    output = _assigned(probabilities, asked)
    found: Order | None = None
    moved = torch.tensor([output[label] != label for label in asked.tolist()])
    for chosen in (torch.ones_like(moved), moved):
        agreement = _agreement(probabilities[chosen], wanted[chosen])
        certain = chosen.all() or agreement >= CERTAIN
        if found is None and certain and _clearly(probabilities[chosen], wanted[chosen], asked[chosen]):
            found = Order("another order", output, agreement, _agreement(probabilities[chosen], asked[chosen]))
    known = found
    for name, outputs in _known_orders(classes):
        theirs = torch.tensor(outputs)[asked]
        agreement = _agreement(probabilities, theirs)
        least = 0.8 * _agreement(probabilities, wanted) if known is found else known.agreement if known else 0.0
        if agreement > least and _clearly(probabilities, theirs, asked):
            known = Order(name, {label: outputs[label] for label in drawn}, agreement, _agreement(probabilities, asked))
    return known


def _known_orders(classes: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """(name, output of each class in the declared order) of orders that data sets are often read in."""
    orders = {
        "alphabetical": sorted(classes),
        "alphabetical, upper and lower case alike": sorted(classes, key=str.casefold),
        "moved on by one": [classes[-1], *classes[:-1]],
        "moved back by one": [*classes[1:], classes[0]],
        "reversed": list(reversed(classes)),
    }
    if all(name.isdecimal() for name in classes):
        orders = {"by number": sorted(classes, key=int), **orders}
    for name, order in orders.items():
        if len(set(order)) == len(order) and order != list(classes):
            yield name, [order.index(label) for label in classes]


def _clearly(probabilities: Tensor, wanted: Tensor, asked: Tensor) -> bool:
    """Whether answers [n, K] give the wanted outputs [n] clearly more probability than the classes asked for [n]."""
    if len(wanted) < 2:
        return False
    rows = torch.arange(len(wanted))
    theirs, declared = probabilities[rows, wanted], probabilities[rows, asked]
    gain = theirs - declared
    error = gain.std().item() / len(gain) ** 0.5
    return (
        gain.mean().item() > SIGNIFICANT * error
        and declared.mean().item() < MUCH_LESS * theirs.mean().item()
        and beyond_chance(probabilities.argmax(1) == wanted, probabilities.shape[1])
    )


def _agreement(probabilities: Tensor, outputs: Tensor) -> float:
    return (probabilities.argmax(1) == outputs).float().mean().item() if len(outputs) else 0.0


def _assigned(probabilities: Tensor, asked: Tensor) -> dict[int, int]:
    """Class -> output, one to one, of the classes asked for: the highest sum of logarithms of mean probabilities."""
    present = sorted(set(asked.tolist()))
    if not present:
        return {}
    rows = torch.stack([probabilities[asked == label].mean(0) for label in present])
    # A thousandth more, so that one certain answer does not decide alone.
    return dict(zip(present, assign((rows.double() + 1e-3).log().numpy()), strict=True))


def assign(gain: np.ndarray) -> list[int]:
    """Column of each row of gain [n, m], n <= m, one to one, with the highest sum.

    The Hungarian method with potentials, row by row along shortest augmenting paths (Jonker and Volgenant 1987).
    """
    n, m = gain.shape
    cost = -gain
    row_potential, column_potential = np.zeros(n + 1), np.zeros(m + 1)
    owner = np.full(m + 1, -1)  # row of each column; the last column stands for "not yet placed"
    for row in range(n):
        owner[m] = row
        column = m
        shortest, before = np.full(m, np.inf), np.full(m, m)
        visited = np.zeros(m + 1, dtype=bool)
        while owner[column] >= 0:
            visited[column] = True
            here = owner[column]
            free = ~visited[:m]
            reduced = cost[here] - row_potential[here] - column_potential[:m]
            closer = free & (reduced < shortest)
            shortest[closer], before[closer] = reduced[closer], column
            following = int(np.where(free, shortest, np.inf).argmin())
            step = shortest[following]
            row_potential[owner[visited]] += step
            column_potential[visited] -= step
            shortest[free] -= step
            column = following
        while column != m:
            owner[column] = owner[before[column]]
            column = int(before[column])
    result = [-1] * n
    for column in range(m):
        if owner[column] >= 0:
            result[owner[column]] = column
    return result
