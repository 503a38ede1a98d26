"""Loops of a control flow: blocks by number, block 0 first, each with the numbers of the blocks that may follow it."""

from dataclasses import dataclass


class Unreadable(ValueError):
    """The program's structure defeats the analysis; the message says how."""


@dataclass(frozen=True)
class Loop:
    header: int
    latches: frozenset[int]
    """Blocks that branch back to the header."""
    body: frozenset[int]


def find_loops(successors: list[list[int]]) -> list[Loop]:
    """The natural loops of a control flow that starts at block 0."""
    latches: dict[int, set[int]] = {}
    for at in reachable(successors, 0):
        for header in successors[at]:
            # A branch goes back where its target cannot be passed by on the way to it.
            if header == at or at not in reachable(successors, 0, without=header):
                latches.setdefault(header, set()).add(at)
    predecessors: list[list[int]] = [[] for _ in successors]
    for at, following in enumerate(successors):
        for target in following:
            predecessors[target].append(at)
    loops = []
    for header, sources in latches.items():
        body = {header}.union(*(reachable(predecessors, latch, without=header) for latch in sources))
        loops.append(Loop(header, frozenset(sources), frozenset(body)))
    return loops


def unwound(successors: list[list[int]]) -> list[list[int]]:
    """The control flow with each branch back to a loop's header turned into branches out of the loop."""
    ways = [list(following) for following in successors]
    for loop in sorted(find_loops(successors), key=lambda loop: len(loop.body)):  # the innermost first
        exits = {target for at in loop.body for target in successors[at] if target not in loop.body}
        for at in loop.body:
            if loop.header in ways[at]:
                ways[at] = sorted({*ways[at], *exits} - {loop.header})
    if any(at in reachable(ways, target) for at, following in enumerate(ways) for target in following):
        raise Unreadable("a loop with two entries")
    return ways


def reachable(edges: list[list[int]], start: int, without: int | None = None) -> set[int]:
    """Blocks on the ways from ``start``, itself included, that do not enter ``without``."""
    seen, open_ends = set(), [] if start == without else [start]
    while open_ends:
        at = open_ends.pop()
        if at not in seen:
            seen.add(at)
            open_ends += [target for target in edges[at] if target != without]
    return seen
