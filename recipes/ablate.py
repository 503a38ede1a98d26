"""Variants of a recipe beside each other, over seeds: runs, tables and a page.

diffdfkd ablate fashion --axis terms --seeds 3 --output runs/ablate
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.shards import write_atomic
from diffdfkd.recipes.table import table as aligned

if TYPE_CHECKING:
    import numpy as np

RECORD, PAGE, CSV = "ablation.json", "ablation.html", "ablation.csv"


def ablate(
    source: str,
    overrides: Sequence[str],
    axes: Sequence[str],
    *,
    seeds: int,
    output: Path,
    csv: Path | None = None,
    jobs: int = 1,
    images: Path | None = None,
    labels: Path | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
) -> str:
    """Make the runs of the axes that are missing under ``output``, and all tables; returns what was found, in words.

    ``jobs`` runs at a time, each with one thread unless the recipe or an override says otherwise. ``images`` and
    ``labels`` are judged on in the place of the recipe's test images; variants in ``skip`` are left out. Raises
    UserError before anything is made, and for a run that failed, once the others are done.
    """
    from diffdfkd.benchmarks.ablation.axis import read_axis, without
    from diffdfkd.benchmarks.ablation.comparisons import refuse_comparison
    from diffdfkd.benchmarks.ablation.plan import plan_runs

    if not axes:
        raise UserError("--axis: give one or more, such as --axis terms")
    if jobs < 1:
        raise UserError(f"--jobs: got {jobs}; one or more")
    if labels is not None and images is None:
        raise UserError("--labels: given without --images; give both")
    table = csv or output / CSV
    _refuse_table(table)
    evaluation = [] if images is None else [f"evaluation.images={images}"]
    evaluation += [] if labels is None else [f"evaluation.labels={labels}"]
    recipe = load_recipe(source, [*overrides, *evaluation])
    if jobs > 1 and recipe.threads is None:
        overrides = [*overrides, "threads=1"]
    chosen = without([read_axis(name, source) for name in axes], skip)
    runs = plan_runs(source, overrides, chosen, seeds, evaluation)
    for run in runs:
        if run.source != "synthetic":
            try:
                refuse_comparison(run.recipe, run.source)
            except UserError as error:
                raise UserError(f"--axis: {run.axis}: variant {run.variant}: {error}") from error
    truth = _labels(runs[0].recipe)
    _claim(output, source, overrides, runs[0].recipe)

    from diffdfkd.benchmarks.ablation.budget_section import equal_rows, worth_rows
    from diffdfkd.benchmarks.ablation.jobs import make_runs
    from diffdfkd.benchmarks.ablation.page import ablation_page
    from diffdfkd.benchmarks.ablation.tables import compare, judged_on, make_cells, run_rows
    from diffdfkd.benchmarks.tables import write_csv
    from diffdfkd.recipes.run_folder import hold

    with hold(output):
        rows = make_runs(runs, output, jobs, progress=progress)
        cells = make_cells(runs, rows)
        pairs = compare(cells, chosen, output, truth)
        tables: dict[str, list[dict[str, Any]]]
        tables = {"": run_rows(runs, rows), "-paired": pairs, "-worth": [], "-equal": []}
        for axis in chosen:
            own = [cell for cell in cells if cell.axis == axis.name]
            tables["-worth"] += worth_rows(axis, own)
            tables["-equal"] += equal_rows(axis, own)
        for suffix, content in tables.items():
            if content:
                write_csv(table.with_name(f"{table.stem}{suffix}.csv"), content)
        judged = judged_on(runs[0])
        page = ablation_page(Path(source).stem, chosen, cells, pairs, judged, len(truth))
        write_atomic(output / PAGE, page.encode())
    return _words(tables[""], table, output / PAGE)


def _labels(recipe: Recipe) -> "np.ndarray":
    """True classes [N] of the real images, which have to be there before the first run."""
    from diffdfkd.recipes.run import open_test

    test = open_test(recipe)
    assert test is not None  # asked when the runs were planned
    _, labels = test.read(range(len(test)))
    return labels.numpy()


def _claim(output: Path, source: str, overrides: Sequence[str], recipe: Recipe) -> None:
    """Make the folder this ablation's; UserError where it is another's, or holds something else."""
    record = {
        "recipe": str(Path(source).resolve()) if Path(source).is_file() else source,
        "overrides": list(overrides),
        "images": recipe.evaluation.images,
        "labels": recipe.evaluation.labels,
    }
    file = output / RECORD
    if file.is_file():
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise UserError(f"--output: {file} is damaged; put it back from a copy, or choose another folder")
        for name, value in record.items():
            if held.get(name) != value:
                raise UserError(
                    f"--output: {output} holds another ablation ({name}: {held.get(name)}, now {value}); "
                    "choose another folder"
                )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists, and is no ablation's folder; choose another one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); choose another folder") from None


def _refuse_table(table: Path) -> None:
    """UserError where the tables could not be written at the end; their folder is made with them."""
    if table.suffix != ".csv" or table.is_dir():
        raise UserError(f"--csv: {table}: name a file that ends in .csv")
    folder = next(folder for folder in table.resolve().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--csv: {table} cannot be written; choose another file")


def _words(rows: Sequence[dict[str, Any]], table: Path, page: Path) -> str:
    """Mean accuracy of each variant at each budget, and where all the rest is."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = (row["axis"], row["variant"], str(row["images"]), str(row["steps"]))
        groups.setdefault(key, []).append(100 * row["student_accuracy"])
    lines = [
        [*key, f"{fmean(values):.2f}", f"{stdev(values):.2f}" if len(values) > 1 else "-"]
        for key, values in groups.items()
    ]
    text = aligned(["axis", "variant", "images", "steps", "accuracy, %", "deviation over seeds"], lines)
    return f"{text}\ntables    {table}\npage      {page}"
