"""Whether an engine costs the student accuracy: the same recipe with and without it, paired by seed.

    python -m diffdfkd.benchmarks.accuracy fashion threads=1 --seeds 0 1 2 --csv accuracy.csv

Each run is ``diffdfkd run`` in a process of its own, the reference with eager float32 networks; a run that is finished
under ``--output`` is not repeated. Evaluation reads the test images once a run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diffdfkd.benchmarks.statistics import t_interval
from diffdfkd.benchmarks.tables import write_csv
from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.command import complain

REFERENCE = ("engine=eager", "engine.precision=float32")


def compare(
    recipe: str, overrides: Sequence[str], engine: Sequence[str], seeds: Sequence[int], output: Path, jobs: int
) -> list[dict[str, object]]:
    """A row for each seed, accuracies in per cent, and one for the mean difference with its 95 % interval."""
    wanted = [(kind, name, seed) for seed in seeds for kind, name in ((REFERENCE, "eager"), (tuple(engine), "engine"))]

    def one(run: tuple[Sequence[str], str, int]) -> float:
        kind, name, seed = run
        return _accuracy(recipe, [*overrides, *kind, f"seed={seed}", f"output={output / f'{name}-{seed}'}"])

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip([run[1:] for run in wanted], pool.map(one, wanted), strict=True))
    rows: list[dict[str, object]] = []
    for seed in seeds:
        eager, given = found["eager", seed], found["engine", seed]
        rows.append({"seed": seed, "eager": eager, "engine": given, "difference": round(given - eager, 2), "t95": ""})
    differences = [found["engine", seed] - found["eager", seed] for seed in seeds]
    _, highest = t_interval(np.array(differences))
    half = round(highest - statistics.mean(differences), 2)
    means = {name: round(statistics.mean(found[name, seed] for seed in seeds), 2) for name in ("eager", "engine")}
    return [*rows, {"seed": "mean", **means, "difference": round(statistics.mean(differences), 2), "t95": half}]


def _accuracy(recipe: str, overrides: Sequence[str]) -> float:
    command = [sys.executable, "-m", "diffdfkd.recipes.cli", "run", recipe, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{overrides[-1]}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    folder = Path(overrides[-1].partition("=")[2])
    accuracy = 100 * json.loads((folder / "result.json").read_text())["student_accuracy"]
    print(f"{folder.name}: {accuracy:.2f}", file=sys.stderr, flush=True)
    return round(accuracy, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="fashion")
    parser.add_argument("overrides", nargs="*", help="for both, such as threads=1")
    parser.add_argument("--engine", nargs="+", default=["engine=compiled", "engine.precision=bfloat16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--csv", type=Path, help="file to write")
    given = parser.parse_args(arguments)
    try:
        rows = compare(given.recipe, given.overrides, given.engine, given.seeds, given.output, given.jobs)
    except UserError as error:
        sys.exit(complain(str(error)))
    if given.csv is not None:
        write_csv(given.csv, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
