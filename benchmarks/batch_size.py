"""The largest batch of a recipe that fits into memory, and the fastest one, by trying.

    python -m diffdfkd.benchmarks.batch_size throughput_fashion threads=2 --memory-mib 2048 --json batches.json

Each batch is four shards of one batch in a process of its own: images a second of the last three, peak memory of all.
From the recipe's own batch it goes up by doubling while the batch fits, or down by halving until one does, and halves
what lies between the largest that fits and the smallest that does not. Engines for one batch are built anew for each:
``engine=eager`` finds the batch in less time. On CUDA memory is that of torch's allocator, and TensorRT's plans are no
part of it: leave room for them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffdfkd.benchmarks.conditions import conditions
from diffdfkd.benchmarks.synthesis_run import TooLarge, synthesize
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain
from diffdfkd.recipes.launch import settle_machine

SHARDS = 4
"""The first of them pays for what comes once."""
NEAR = 1.25
"""The search ends where the smallest batch that does not fit is less than this times the largest that does."""


@dataclass
class Row:
    """One batch."""

    batch: int
    fits: bool
    images_per_second: float | None = None
    """None where it did not come that far."""
    peak_memory_mib: float | None = None
    reason: str | None = None
    """Why it does not fit."""


def search(start: int, most: int, tried: Callable[[int], bool]) -> int | None:
    """The largest batch up to ``most`` that fits, to within `NEAR`; None if not even one image does."""
    least_bad = None
    batch = min(start, most)
    while not tried(batch):
        least_bad = batch
        if batch == 1:
            return None
        batch //= 2
    while least_bad is None and batch < most:
        larger = min(2 * batch, most)
        if tried(larger):
            batch = larger
        else:
            least_bad = larger
    while least_bad is not None and least_bad > max(NEAR * batch, batch + 1):
        between = (batch + least_bad) // 2
        if tried(between):
            batch = between
        else:
            least_bad = between
    return batch


def measure(recipe: str, overrides: Sequence[str], settled: Recipe, limit_mib: float | None, most: int) -> list[Row]:
    """A row for each batch that was tried, in ascending order; ``settled`` is the recipe with its overrides.

    Raises UserError where a run fails otherwise.
    """
    rows: dict[int, Row] = {}
    with tempfile.TemporaryDirectory() as folder:

        def tried(batch: int) -> bool:
            rows[batch] = _row(recipe, [*overrides, *_sizes(settled, batch)], batch, limit_mib, Path(folder))
            print(_line(rows[batch]), file=sys.stderr, flush=True)
            return rows[batch].fits

        search(settled.synthesis.batch_size, most, tried)
    return [rows[batch] for batch in sorted(rows)]


def _sizes(recipe: Recipe, batch: int) -> list[str]:
    """Overrides for `SHARDS` shards of one batch, and less than a class more."""
    images = -(-SHARDS * batch // len(recipe.teacher.classes))
    sizes = {"images_per_class": images, "batch_size": batch, "batches_per_shard": 1}
    return ["rounds=1", *(f"synthesis.{name}={size}" for name, size in sizes.items())]


def _row(recipe: str, overrides: Sequence[str], batch: int, limit_mib: float | None, folder: Path) -> Row:
    try:
        made = synthesize(recipe, overrides, folder / str(batch), name=f"a batch of {batch}")
    except TooLarge as reason:
        return Row(batch, fits=False, reason=str(reason))
    row = Row(batch, True, round(made.rate, 2), round(made.memory, 1))
    if limit_mib is not None and made.memory > limit_mib:
        row.fits, row.reason = False, f"it takes {made.memory:,.0f} of {limit_mib:,.0f} MiB"
    return row


def _line(row: Row) -> str:
    if row.images_per_second is None:
        return f"batch {row.batch}: does not fit ({row.reason})"
    said = f"batch {row.batch}: {row.images_per_second:.1f} images a second, {row.peak_memory_mib:,.0f} MiB"
    return said if row.fits else f"{said}: too much ({row.reason})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 with one line on bad input, or where no batch fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="throughput_fashion")
    parser.add_argument("overrides", nargs="*", help="such as threads=2 engine=eager")
    parser.add_argument("--memory-mib", type=float, help="limit of the run's peak memory (what the machine has)")
    parser.add_argument("--most", type=int, default=4096, help="largest batch to try (4096)")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args(arguments)
    try:
        for name, value in (("--memory-mib", given.memory_mib), ("--most", given.most)):
            if value is not None and not value >= 1:
                raise UserError(f"{name}: got {value:g}; at least 1 expected")
        recipe = settle_machine(load_recipe(given.recipe, given.overrides))
        rows = measure(given.recipe, given.overrides, recipe, given.memory_mib, given.most)
    except UserError as error:
        sys.exit(complain(str(error)))
    if given.json is not None:
        made_on = {**conditions(torch.device(recipe.device)), "threads": recipe.threads}
        content = {"conditions": made_on, "rows": [asdict(row) for row in rows]}
        write_atomic(given.json, (json.dumps(content, indent=1) + "\n").encode())
    for row in rows:
        print(_line(row))
    fitting = [row for row in rows if row.fits]
    if not fitting:
        sys.exit(complain("synthesis.batch_size: not even one image fits into memory"))
    fastest = max(fitting, key=lambda row: row.images_per_second or 0)
    print(f"largest that fits: synthesis.batch_size={fitting[-1].batch}; fastest: {fastest.batch}")


if __name__ == "__main__":
    main()
