"""The jobs of an ablation as processes, some at a time; a finished one is never done again."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from diffdfkd.benchmarks.ablation.plan import Run, Store, plan_stores
from diffdfkd.benchmarks.ablation.worker import PREDICTIONS, ROW, Job, write_job
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.progress import progress_bar
from diffdfkd.engine.recipe import Recipe, dump_recipe
from diffdfkd.engine.shards import DamagedShard, read_sidecar, round_folder, shard_path
from diffdfkd.recipes.run_folder import begun

LOG = "log.txt"
WAIT = 0.2
"""Seconds between two looks at the processes."""


class Process(Protocol):
    """What is used of a `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...


@dataclass(frozen=True)
class Task:
    job: Job
    name: str
    run: Run | None
    """None for a store."""
    waits_for: str | None
    """Folder of the store that has to be finished before."""

    @property
    def folder(self) -> Path:
        return Path(self.job.recipe["output"])


def make_runs(runs: Sequence[Run], output: Path, at_once: int, *, progress: bool = True) -> dict[str, dict[str, Any]]:
    """Row of each run by its digest, made now or before.

    A failed run does not keep the others from being made: the first failure is raised as a UserError at the end.
    Interrupted, the processes are told to stop and waited for.
    """
    unique = {run.digest: run for run in runs}
    stores = plan_stores(list(unique.values()))
    rows = {digest: row for digest in unique if (row := read_row(output, unique[digest])) is not None}
    waiting = _tasks([run for run in unique.values() if run.digest not in rows], stores, output)
    failures: list[str] = []
    running: dict[str, tuple[Task, Process]] = {}
    bar = progress_bar(len(unique), "ablation", unit="runs", shown=progress, done=len(rows))
    with bar, _termination_interrupts():
        try:
            while waiting or running:
                pending = {str(task.folder) for task in waiting} | set(running)
                ready = [task for task in waiting if task.waits_for not in pending]
                for task in ready[: at_once - len(running)]:
                    waiting.remove(task)
                    running[str(task.folder)] = (task, launch(task.job))
                time.sleep(WAIT)
                for folder, (task, process) in list(running.items()):
                    if (code := process.poll()) is None:
                        continue
                    del running[folder]
                    row = read_row(output, task.run) if task.run is not None and code == 0 else None
                    if code != 0 or (task.run is not None and row is None):
                        failures.append(f"{task.name}: {_last_words(task.folder)}")
                        waiting = [other for other in waiting if other.waits_for != folder]
                    elif row is not None and task.run is not None:
                        rows[task.run.digest] = row
                        _tell(f"{task.name}: {100 * row['student_accuracy']:.2f} %", progress)
                        bar.update()
        finally:
            # All of them, whatever was in the way.
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    if failures:
        more = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}; mend it, and give the command again: what is made stays")
    return rows


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """A request to end is taken as Ctrl-C is, since processes that outlive this one would hold their folders."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(job: Job) -> Process:
    """Start the job's process; what it says goes to ``log.txt`` in its folder."""
    file = write_job(job)
    command = [sys.executable, "-m", "diffdfkd.benchmarks.ablation.worker", str(file)]
    with open(file.with_name(LOG), "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def run_folder(output: Path, run: Run) -> Path:
    return output / "runs" / run.digest


def read_row(output: Path, run: Run) -> dict[str, Any] | None:
    """What a finished run left; None where it is still to be made. UserError where the folder is another run's."""
    folder = run_folder(output, run)
    if not (folder / ROW).is_file() or not (folder / PREDICTIONS).is_file():
        return None
    try:
        held = json.loads((folder / ROW).read_text(encoding="utf-8"))
        row, made_by = dict(held["row"]), held["made_by"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / ROW}: damaged ({error}); delete it, and the run is judged again") from None
    if made_by != json.loads(json.dumps(run.content)):
        raise UserError(f"{folder / ROW}: made by another recipe; choose another --output, or delete the folder")
    return row


def _tasks(runs: Sequence[Run], stores: Mapping[str, Store], output: Path) -> list[Task]:
    """In the runs' order, each store before the first run that needs it; stores that are whole are left out."""
    tasks, planned = [], set[str]()
    for run in runs:
        store = stores.get(run.digest)
        place = output / "images" / store.digest if store is not None else None
        if store is not None and place is not None and store.digest not in planned:
            planned.add(store.digest)
            recipe = _grown(store.recipe, place)
            if not _whole(place, recipe):
                name = f"images for {run.axis}: {run.variant}, seed {run.seed}"
                tasks.append(Task(Job("store", _dump(recipe, place), {}, None), name, None, None))
        folder = run_folder(output, run)
        store_folder = None if place is None else str(place)
        job = Job(run.source, _dump(run.recipe, folder), run.content, store_folder)
        tasks.append(Task(job, run.name, run, store_folder))
    return tasks


def _dump(recipe: Recipe, folder: Path) -> dict[str, Any]:
    return {**dump_recipe(recipe), "output": str(folder)}


def _grown(recipe: Recipe, place: Path) -> Recipe:
    """With as many images as an earlier ablation wanted, if those were more."""
    before = begun(place)
    if before is None or before.synthesis.images_per_class <= recipe.synthesis.images_per_class:
        return recipe
    synthesis = recipe.synthesis.model_copy(update={"images_per_class": before.synthesis.images_per_class})
    return recipe.model_copy(update={"synthesis": synthesis})


def _whole(place: Path, recipe: Recipe) -> bool:
    """Whether every shard is there, by its sidecar, which is written last; the run that uses it looks closer."""
    folder = round_folder(place / "synthetic", 0)
    for shard in shard_plan(recipe, 0):
        try:
            sidecar = read_sidecar(shard_path(folder, shard.index).with_suffix(".json"))
        except DamagedShard:
            return False
        if sidecar.images + sidecar.dropped != shard.samples:
            return False
    return begun(place) is not None


def _last_words(folder: Path) -> str:
    """The last line of a job's log."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"{lines[-1].removeprefix('error: ') if lines else 'no word'} ({log})"


def _tell(line: str, progress: bool) -> None:
    if progress:
        tqdm.write(line, file=sys.stderr)
