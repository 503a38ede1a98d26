"""Guided synthesis as a whole: a throughput recipe beside the plain one, interleaved, shards compared byte by byte.

    python -m diffdfkd.benchmarks.throughput fashion throughput_fashion --json throughput.json

Four ways of making the same samples, each in a process of its own, in turn:

    plain           the plain recipe as it stands, all networks eager in float32
    plain, engines  the plain recipe with the throughput recipe's engines and precision
    kept            the throughput recipe, all networks eager in float32
    throughput      the throughput recipe

The shards of ``plain`` and ``kept`` must be equal, and those of ``plain, engines`` and ``throughput``: what makes a
throughput recipe faster besides its engines changes no image. Rates are those of whole shards after the first, which
pays for what comes once; engines are built before the first process is timed.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffdfkd.benchmarks.conditions import conditions
from diffdfkd.benchmarks.synthesis_run import Synthesis, synthesize
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain, refuse_json

EAGER = ["engine=eager", "engine.precision=float32"]
EQUAL = (("plain", "kept"), ("plain, engines", "throughput"))


@dataclass(frozen=True)
class Way:
    """One way of making the images."""

    name: str
    recipe: str
    overrides: list[str]


@dataclass
class Row:
    """What one way came to over its repetitions."""

    way: str
    images_per_second: float
    """Median of the repetitions."""
    lowest: float
    highest: float
    times_plain: float
    """Median of the ratios to ``plain`` within one turn."""
    writing_share: float
    """Largest share of the shards' time that encoding and writing took of the processor, or had denoising wait."""
    wall_seconds: float
    """Median, of the whole process."""
    peak_memory_mib: float
    digest: str
    """Of the shards, the same for every repetition."""


def compare(
    plain: str, fast: str, engine: str, overrides: Sequence[str], repetitions: int, precision: str = "bfloat16"
) -> tuple[list[Row], Recipe]:
    """(a row for each way, the plain recipe as it ran); raises UserError where shards that must be equal are not."""
    engines = [f"engine={engine}", f"engine.precision={precision}"]
    ways = [
        Way("plain", plain, EAGER),
        Way("plain, engines", plain, engines),
        Way("kept", fast, EAGER),
        Way("throughput", fast, engines),
    ]
    found: dict[str, list[Synthesis]] = {way.name: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        few = [*overrides, "synthesis.images_per_class=1"]
        for way in ways:
            _make(way, few, Path(folder) / "first" / way.name)
        for turn in range(repetitions):
            for way in ways:
                found[way.name].append(_make(way, overrides, Path(folder) / str(turn) / way.name))
                print(f"{way.name}: {found[way.name][-1].rate:.1f} images a second", file=sys.stderr)
    for one, other in EQUAL:
        if len(digests := {made.digest for name in (one, other) for made in found[name]}) != 1:
            raise UserError(f"{one}, {other}: {len(digests)} different sets of shards, where all must be equal")
    return [_row(name, made, found["plain"]) for name, made in found.items()], found["plain"][0].recipe


def _row(name: str, made: list[Synthesis], plain: list[Synthesis]) -> Row:
    rates = [one.rate for one in made]
    return Row(
        name,
        round(statistics.median(rates), 2),
        round(min(rates), 2),
        round(max(rates), 2),
        round(statistics.median(mine / theirs.rate for mine, theirs in zip(rates, plain, strict=True)), 3),
        round(max(one.writing for one in made), 4),
        round(statistics.median(one.wall for one in made), 1),
        round(statistics.median(one.memory for one in made), 1),
        made[0].digest,
    )


def _make(way: Way, overrides: Sequence[str], output: Path) -> Synthesis:
    return synthesize(way.recipe, [*way.overrides, *overrides], output, name=way.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", nargs="?", default="fashion", help="recipe")
    parser.add_argument("throughput", nargs="?", default="throughput_fashion", help="recipe of the same samples")
    parser.add_argument("overrides", nargs="*", help="for both, such as threads=2")
    parser.add_argument("--engine", default="compiled", help="of UNet and chain (compiled)")
    parser.add_argument("--precision", default="bfloat16", help="of the engines (bfloat16)")
    parser.add_argument("--images-per-class", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_intermixed_args(arguments)
    try:
        refuse_json(given.json)
        overrides = [f"synthesis.images_per_class={given.images_per_class}", *given.overrides]
        plain, fast = given.plain, given.throughput
        rows, used = compare(plain, fast, given.engine, overrides, given.repetitions, given.precision)
    except UserError as error:
        sys.exit(complain(str(error)))
    made_on = {**conditions(torch.device(used.device)), "threads": used.threads}
    content = {"conditions": made_on, "rows": [asdict(row) for row in rows]}
    text = json.dumps(content, indent=1) + "\n"
    print(text, end="")
    if given.json is not None:
        write_atomic(given.json, text.encode())


if __name__ == "__main__":
    main()
