"""Jobs without their processes: order, what is shared, what is made again, and failures."""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from diffdfkd.benchmarks.ablation import jobs
from diffdfkd.benchmarks.ablation.axis import Axis
from diffdfkd.benchmarks.ablation.jobs import LOG, make_runs, read_row, run_folder
from diffdfkd.benchmarks.ablation.plan import Run, plan_runs
from diffdfkd.benchmarks.ablation.worker import PREDICTIONS, ROW, Job
from diffdfkd.engine.errors import UserError

VARIANTS = {"a": [], "longer": ["distillation.steps=4000"], "unguided": ["guidance.mode=none"]}


@dataclass
class Machine:
    """In the place of the processes: each takes two looks; those of a variant in ``fails`` fail."""

    started: list[Job] = field(default_factory=list)
    running: int = 0
    most: int = 0
    fails: tuple[str, ...] = ()
    stopped: list[Job] = field(default_factory=list)
    never_done: bool = False

    def launch(self, job: Job) -> "Done":
        self.started.append(job)
        self.running += 1
        self.most = max(self.most, self.running)
        return Done(self, job)


@dataclass
class Done:
    machine: Machine
    job: Job
    looks: int = 2

    def poll(self) -> int | None:
        self.looks -= 1
        if self.looks or self.machine.never_done:
            return None
        self.machine.running -= 1
        folder = Path(self.job.recipe["output"])
        folder.mkdir(parents=True, exist_ok=True)
        if self.job.kind in self.machine.fails or self.job.recipe["guidance"]["mode"] in self.machine.fails:
            (folder / LOG).write_text("half a bar\nerror: guidance.rho: too much; take less\n")
            return 2
        if self.job.kind != "store":
            np.save(folder / PREDICTIONS, np.zeros(4))
            row = {"student_accuracy": 0.5, "steps": self.job.recipe["distillation"]["steps"]}
            (folder / ROW).write_text(json.dumps({"row": row, "made_by": self.job.content}))
        return 0

    def terminate(self) -> None:
        self.machine.stopped.append(self.job)

    def wait(self) -> int:
        return -15


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    monkeypatch.setattr(jobs, "launch", machine.launch)
    monkeypatch.setattr(jobs, "WAIT", 0.0)
    yield machine


@pytest.fixture
def runs() -> list[Run]:
    axis = Axis.model_validate({"name": "x", "reference": "a", "variants": VARIANTS})
    return plan_runs("fashion", ["device=cpu", "threads=1"], [axis], 2)


def test_each_store_once_and_before_its_runs(machine: Machine, runs: list[Run], tmp_path: Path) -> None:
    rows = make_runs(runs, tmp_path, 2, progress=False)
    assert {digest: row["steps"] for digest, row in rows.items()} == {
        run.digest: run.recipe.distillation.steps for run in runs
    }
    folders = [job.recipe["output"] for job in machine.started]
    assert len(folders) == len(set(folders)) == 4 + 6, "guided and unguided, two seeds"
    for job in machine.started:
        if job.kind != "store":
            assert job.store in folders[: folders.index(job.recipe["output"])]
    assert machine.most == 2


def test_what_is_finished_is_not_repeated(machine: Machine, runs: list[Run], tmp_path: Path) -> None:
    first = make_runs(runs[:2], tmp_path, 1, progress=False)
    count = len(machine.started)
    assert make_runs(runs[:2], tmp_path, 1, progress=False) == first and len(machine.started) == count
    (run_folder(tmp_path, runs[0]) / ROW).unlink()
    make_runs(runs[:2], tmp_path, 1, progress=False)
    assert [job.recipe["output"] for job in machine.started[count:] if job.kind != "store"] == [
        str(run_folder(tmp_path, runs[0]))
    ]


def test_a_failed_run_is_named_and_the_others_are_made(
    machine: Machine, runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = ("none",)
    with pytest.raises(UserError) as error:
        make_runs(runs, tmp_path, 2)
    assert str(error.value).startswith("images for x: unguided, seed 0: guidance.rho: too much; take less (")
    assert "(1 more failed); mend it, and give the command again" in str(error.value)
    assert [read_row(tmp_path, run) is not None for run in runs] == [True, True, False] * 2
    assert "x: longer, 4000 images, 4000 steps, seed 1: 50.00 %\n" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_all_processes_are_stopped(
    number: int, machine: Machine, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.never_done = True
    looks = 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        assert looks < 9, "not interrupted"
        if looks > 3:
            signal.raise_signal(number)

    monkeypatch.setattr("time.sleep", sleep)
    # A shell's background processes ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_runs(runs, tmp_path, 2, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert machine.stopped == machine.started and len(machine.started) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_rows_of_another_recipe_and_damaged_ones_are_refused(machine: Machine, runs: list[Run], tmp_path: Path) -> None:
    make_runs(runs[:1], tmp_path, 1, progress=False)
    file = run_folder(tmp_path, runs[0]) / ROW
    held = json.loads(file.read_text())
    held["made_by"]["recipe"]["seed"] = 7
    file.write_text(json.dumps(held))
    with pytest.raises(UserError, match="made by another recipe; choose another --output"):
        read_row(tmp_path, runs[0])
    file.write_text("{")
    with pytest.raises(UserError, match=r"damaged .* delete it"):
        read_row(tmp_path, runs[0])


def test_a_store_asks_for_the_most_images(machine: Machine, tmp_path: Path) -> None:
    axis = Axis.model_validate({"name": "x", "reference": "a", "variants": VARIANTS, "grid": {"images": [300, 100]}})
    runs = plan_runs("fashion", ["device=cpu", "threads=1"], [axis], 1)
    make_runs(runs, tmp_path, 1, progress=False)
    wanted = [job.recipe["synthesis"]["images_per_class"] for job in machine.started if job.kind == "store"]
    assert wanted == [30, 30]
