"""A picture of an ablation's table: accuracy over images, steps or seconds, as an SVG file.

    python -m diffdfkd.benchmarks.curves benchmarks/results/ablation-fashion.csv --axis initialization --across steps \
        --images 1200 --output curves.svg

Points are means over seeds, bars standard deviations. Over images, a variant that learns from fresh draws is a dashed
level.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from diffdfkd.benchmarks.standalone_chart import standalone
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.interval_chart import Mean, interval_curves
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.command import complain

Row = Mapping[str, str]

ACROSS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "images": ("images", lambda row: float(row["images"])),
    "steps": ("distillation steps", lambda row: float(row["steps"])),
    "seconds": (
        "seconds of synthesis and distillation",
        lambda row: float(row["synthesis_seconds"]) + float(row["distillation_seconds"]),
    ),
}
"""What lies across, with its label, by the command's name for it."""


def read_rows(table: Path, axis: str) -> list[Row]:
    """The axis's rows; UserError names the file, or the axes that it has."""
    try:
        with table.open(newline="", encoding="utf-8") as lines:
            rows: list[Row] = [*csv.DictReader(lines)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"TABLE: {table}: cannot be read ({error}); give a table of diffdfkd ablate") from None
    if not rows or not {"axis", "variant", "images", "steps", "sampling_steps", "student_accuracy"} <= set(rows[0]):
        raise UserError(f"TABLE: {table}: is no table of runs as diffdfkd ablate writes it")
    chosen = [row for row in rows if row["axis"] == axis]
    if not chosen:
        there = ", ".join(dict.fromkeys(row["axis"] for row in rows))
        raise UserError(f"--axis: {table} has no rows of {axis}; it has {there}")
    return chosen


def chart(rows: Sequence[Row], fresh: set[str], across: str, title: str) -> str:
    """A standalone SVG of mean accuracy, in per cent; a curve for each variant, ``fresh`` those of `fresh_draws`.

    UserError where a curve would have several points at one place, and names the option that parts them.
    """
    label, place = ACROSS[across]
    steps = {row["steps"] for row in rows}
    images = {row["images"] for row in rows if row["variant"] not in fresh}
    for field, values, needed in (
        ("steps", steps, across == "images" or (across == "seconds" and len(images) > 1)),
        ("images", images, across == "steps"),
    ):
        if needed and len(values) > 1:
            raise UserError(f"--{field}: the rows have {', '.join(sorted(values, key=int))}; give one of them")
    curves: dict[str, list[tuple[float, Mean]]] = {}
    for (variant, _, _), cell in _cells(rows).items():
        curves.setdefault(variant, []).append((fmean(place(row) for row in cell), _mean(cell)))
    levels = {name: points[0][1] for name, points in curves.items() if name in fresh and across == "images"}
    series = {name: points for name, points in curves.items() if name not in levels}
    return standalone(interval_curves(title, series, levels, label), width=720)


def fresh_draws(rows: Sequence[Row]) -> set[str]:
    """Variants that learnt from fresh draws: not synthesised, and of as many images as no synthesised one has."""
    made = {row["images"] for row in rows if int(row["sampling_steps"])}
    return {row["variant"] for row in rows if not int(row["sampling_steps"]) and row["images"] not in made}


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows that differ in their seed alone."""
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["images"], row["steps"]), []).append(row)
    return cells


def _mean(cell: Sequence[Row]) -> Mean:
    values = [100 * float(row["student_accuracy"]) for row in cell]
    deviation = stdev(values) if len(values) > 1 else float("nan")
    return Mean(fmean(values), fmean(values) - deviation, fmean(values) + deviation)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV that diffdfkd ablate wrote")
    parser.add_argument("--axis", required=True, help="whose rows are drawn")
    parser.add_argument("--steps", type=int, help="rows of this number of distillation steps alone")
    parser.add_argument("--images", type=int, help="rows of this number of images alone, beside those of fresh draws")
    parser.add_argument("--across", choices=list(ACROSS), default="images")
    parser.add_argument("--title", help="of the picture (axis and budget)")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .svg")
    given = parser.parse_args(arguments)
    try:
        if given.output.suffix != ".svg":
            raise UserError(f"--output: {given.output}: name a file that ends in .svg")
        rows = read_rows(given.table, given.axis)
        fresh = fresh_draws(rows)
        for field in ("steps", "images"):
            wanted = getattr(given, field)
            if wanted is None:
                continue
            # Fresh draws have no number of images of their own.
            spared = fresh if field == "images" else set()
            kept = [row for row in rows if int(row[field]) == wanted or row["variant"] in spared]
            if not kept:
                there = ", ".join(sorted({row[field] for row in rows}, key=int))
                raise UserError(f"--{field}: {wanted}: no row of {given.axis} has it; there are {there}")
            rows = kept
        title = given.title or f"{given.axis}: accuracy in %"
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(given.output, chart(rows, fresh, given.across, title).encode())
    except UserError as error:
        sys.exit(complain(str(error)))


if __name__ == "__main__":
    main()
