"""The largest batch of a recipe that fits into memory, and the fastest one, by trying.

    python -m diffdfkd.benchmarks.batch_size throughput_fashion threads=2 --memory-mib 2048 --json batches.json

Each batch is four shards of one batch, or more where the classes are many: an image of each class at least. It runs in
a process of its own: images a second of the shards after the first, peak memory of all of it, with its engines built
and proven in an empty cache, as in a user's first run. What the C++ compiler takes, and the process in which a compiled
engine is tried, comes on top. From the recipe's own batch it goes up by doubling while the batch fits, or down by
halving until one does, and halves what lies between the largest that fits and the smallest that does not; a batch that
the recipe's other settings forbid gives way to the next that they allow.

Name the engine that the run is to have: for shards this few ``engine=auto`` is eager, and another engine takes other
memory. Batches come one after the other, so differences of a few per cent between their rates say nothing. The chain of
later rounds has the student in it, which takes some more. On CUDA memory is that of torch's allocator alone: leave room
for TensorRT's plans and ONNX Runtime's arenas.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffdfkd.benchmarks.conditions import conditions
from diffdfkd.benchmarks.synthesis_run import Synthesis, TooLarge, synthesize
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain, refuse_json

SHARDS = 4
"""The first of them pays for what comes once."""
NEAR = 1.25
"""The search ends where the smallest batch that does not fit is at most this times the largest that does, or the next
number."""


@dataclass
class Row:
    """One batch."""

    batch: int
    fits: bool
    images_per_second: float | None = None
    """None where it did not come that far."""
    peak_memory_mib: float | None = None
    engines: str | None = None
    """Of UNet and guidance chain, as the run settled them."""
    reason: str | None = None
    """Why it does not fit."""


def search(
    start: int, most: int, tried: Callable[[int], bool], allowed: Callable[[int], bool] = lambda batch: True
) -> int | None:
    """The largest batch up to ``most`` that is allowed and fits, to within `NEAR`; None if there is none."""

    def near(aim: int, least: int, most: int) -> int | None:
        """The allowed batch in a range that is nearest to ``aim``."""
        aim = min(aim, most)
        outward = (batch for away in range(most - least + 1) for batch in (aim - away, aim + away))
        return next((batch for batch in outward if least <= batch <= most and allowed(batch)), None)

    least_bad = None
    batch = near(min(start, most), 1, most)
    while batch is not None and not tried(batch):
        least_bad = batch
        batch = near(batch // 2, 1, batch - 1)
    if batch is None:
        return None
    while least_bad is None and (larger := near(2 * batch, batch + 1, most)) is not None:
        if tried(larger):
            batch = larger
        else:
            least_bad = larger
    while least_bad is not None and least_bad > NEAR * batch:
        between = near((batch + least_bad) // 2, batch + 1, least_bad - 1)
        if between is None:
            break
        if tried(between):
            batch = between
        else:
            least_bad = between
    return batch


def measure(
    recipe: str, overrides: Sequence[str], limit_mib: float | None, most: int, json_file: Path | None
) -> list[Row]:
    """A row for each batch that was tried, in ascending order; after each ``json_file`` holds those that there are.

    Raises UserError where a run fails for another reason than its size.
    """
    settled = load_recipe(recipe, overrides)
    rows: dict[int, Row] = {}
    made_on = conditions(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:

        def asked(batch: int) -> list[str]:
            return [*overrides, *_sizes(settled, batch), f"engine.cache={folder}/cache"]

        def allowed(batch: int) -> bool:
            try:
                load_recipe(recipe, asked(batch))
            except UserError:
                return False
            return True

        def tried(batch: int) -> bool:
            nonlocal made_on
            name = f"a batch of {batch}"
            try:
                made = synthesize(recipe, asked(batch), Path(folder) / str(batch), name=name)
            except TooLarge as reason:
                row = Row(batch, fits=False, reason=str(reason).removeprefix(f"{name}: "))
            else:
                row, used = _row(batch, made, limit_mib), made.recipe
                made_on = {**conditions(torch.device(used.device)), "threads": used.threads}
            # A batch's shards and engines are of no use to the next.
            for left in (str(batch), "cache"):
                shutil.rmtree(Path(folder) / left, ignore_errors=True)
            rows[batch] = row
            print(_line(row), file=sys.stderr, flush=True)
            if json_file is not None:
                content = {"conditions": made_on, "rows": [asdict(row) for row in _ascending(rows)]}
                write_atomic(json_file, (json.dumps(content, indent=1) + "\n").encode())
            return row.fits

        search(settled.synthesis.batch_size, most, tried, allowed)
    if not rows:
        # None is allowed: say why, as the run would.
        load_recipe(recipe, [*overrides, *_sizes(settled, min(settled.synthesis.batch_size, most))])
    return _ascending(rows)


def _ascending(rows: dict[int, Row]) -> list[Row]:
    return [rows[batch] for batch in sorted(rows)]


def _sizes(recipe: Recipe, batch: int) -> list[str]:
    """Overrides for `SHARDS` shards of one batch in the first round, and less than one image of each class more."""
    # CutMix within a class needs two images of it.
    fan_out = recipe.synthesis.fan_out
    least = 2 if (recipe.cutmix.every or fan_out > 1) and recipe.cutmix.partner == "within" else 1
    images = fan_out * max(least, -(-SHARDS * batch // len(recipe.teacher.classes)))
    sizes = {"images_per_class": images * recipe.rounds, "batch_size": batch, "batches_per_shard": 1}
    return ["distillation.holdout=0", *(f"synthesis.{name}={size}" for name, size in sizes.items())]


def _row(batch: int, made: Synthesis, limit_mib: float | None) -> Row:
    engine = made.recipe.engine
    names = f"{engine.unet}, {engine.chain}"
    row = Row(batch, True, round(made.rate, 2), round(made.memory, 1), names)
    if limit_mib is not None and made.memory > limit_mib:
        row.fits, row.reason = False, f"it takes {made.memory:,.0f} of {limit_mib:,.0f} MiB"
    return row


def _line(row: Row) -> str:
    if row.images_per_second is None:
        return f"batch {row.batch}: does not fit ({row.reason})"
    said = f"batch {row.batch}: {row.images_per_second:.1f} images a second, {row.peak_memory_mib:,.0f} MiB"
    return said if row.fits else f"{said}: too much ({row.reason})"


def summary(rows: Sequence[Row]) -> str:
    """The last line: the largest batch that fits, what bounds it, and the fastest."""
    fits = [row for row in rows if row.fits]
    if not fits:
        raise UserError(f"synthesis.batch_size: no batch fits into memory ({rows[0].reason})")
    largest = fits[-1].batch
    beyond = next((f"{row.batch} does not" for row in rows if row.batch > largest), "no larger one was tried")
    fastest = max(fits, key=lambda row: row.images_per_second or 0)
    return f"largest that fits: synthesis.batch_size={largest} ({beyond}); fastest: {fastest.batch}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 with one line on bad input, or where no batch fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="throughput_fashion")
    parser.add_argument("overrides", nargs="*", help="such as threads=2 engine=compiled")
    parser.add_argument("--memory-mib", type=float, help="limit of the run's peak memory (what the machine has)")
    parser.add_argument("--most", type=int, default=4096, help="largest batch to try (4096)")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_intermixed_args(arguments)
    try:
        for name, value in (("--memory-mib", given.memory_mib), ("--most", given.most)):
            if value is not None and not value >= 1:
                raise UserError(f"{name}: got {value:g}; at least 1 expected")
        refuse_json(given.json)
        rows = measure(given.recipe, given.overrides, given.memory_mib, given.most, given.json)
        for row in rows:
            print(_line(row))
        print(summary(rows))
    except UserError as error:
        sys.exit(complain(str(error)))


if __name__ == "__main__":
    main()
