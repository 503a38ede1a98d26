"""``diffdfkd ablate``: its tables and page without real runs, its refusals, and once for real."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diffdfkd.benchmarks.ablation import jobs
from diffdfkd.benchmarks.ablation.worker import PREDICTIONS, ROW, Job
from diffdfkd.engine.idx import read_idx
from diffdfkd.engine.recipe_file import CONFIGS
from diffdfkd.recipes.ablate import CSV, PAGE

Call = Callable[[list[str]], tuple[int, str, str]]
LABELS = CONFIGS.parent / "assets" / "fashion" / "test" / "t10k-labels-idx1-ubyte.gz"
AXIS: dict[str, Any] = {
    "about": "a <trial>",
    "reference": "guided",
    "grid": {"images": [100, 1000, 10000], "steps": [10, 20]},
    "variants": {
        "unguided": ["guidance.mode=none"],
        "guided": [],
        "like guided": ["guidance.every=2"],
        "floor": {"images": "floor"},
    },
}
POINTS = {"unguided": -12, "guided": 0, "like guided": 0}


class Finished:
    """A process whose student is as good as its recipe says: ten points a tenfold of images."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def poll(self) -> int:
        recipe, folder = self.job.recipe, Path(self.job.recipe["output"])
        folder.mkdir(parents=True, exist_ok=True)
        if self.job.kind == "store":
            return 0
        labels = read_idx(LABELS, 1)
        images = 10 * recipe["synthesis"]["images_per_class"]
        guidance = recipe["guidance"]
        variant = {"none": "unguided"}.get(guidance["mode"], "guided" if guidance["every"] == 1 else "like guided")
        accuracy = 70.0 if self.job.kind == "floor" else 50 + 10 * np.log10(images) + POINTS[variant]
        accuracy += recipe["distillation"]["steps"] / 10 - 1
        seed = recipe["seed"] + 100 * guidance["every"]
        accuracy += np.random.default_rng(seed).normal(0, 0.3)
        wrong = np.random.default_rng([seed, images]).random(len(labels)) >= accuracy / 100
        predictions = np.where(wrong, (labels + 1) % 10, labels)
        np.save(folder / PREDICTIONS, predictions)
        right = float((predictions == labels).mean())
        row = {
            "student_accuracy": right,
            "teacher_accuracy": 0.93,
            "agreement": right,
            "images": images,
            "steps": recipe["distillation"]["steps"],
            "sampling_steps": 12,
            "images_per_second": 20.0,
            "synthesis_seconds": 0.0 if self.job.kind == "floor" else images / 20,
            "distillation_seconds": 3.0,
            "network_evaluations": 0 if self.job.kind == "floor" else 12 if variant == "unguided" else 24,
            "commit": "abc",
            "engine": "eager",
            "device": "cpu",
            "threads": 1,
        }
        (folder / ROW).write_text(json.dumps({"row": row, "made_by": self.job.content}))
        return 0

    def wait(self) -> int:
        return 0

    def terminate(self) -> None:
        raise AssertionError("it had ended")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    found: list[Job] = []

    def launch(job: Job) -> Finished:
        found.append(job)
        return Finished(job)

    monkeypatch.setattr(jobs, "launch", launch)
    monkeypatch.setattr(jobs, "WAIT", 0.0)
    return found


def axis_file(folder: Path, content: dict[str, Any] = AXIS, name: str = "trial") -> str:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / f"{name}.yaml")


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_and_page(tmp_path: Path, launched: list[Job], command_line: Call) -> None:
    output = tmp_path / "out"
    arguments = ["ablate", "fashion", "device=cpu", "--axis", axis_file(tmp_path), "--jobs", "2"]
    arguments += ["--output", str(output)]
    code, out, err = command_line(arguments)
    assert code == 0, err
    assert "trial: unguided, 100 images, 10 steps, seed 0: " in err
    assert re.search(r"trial  unguided +100 +10 +5\d\.", out) and str(output / PAGE) in out

    rows = read(output / CSV)
    assert len(rows) == 3 * (3 * 3 * 2 + 2) and {row["threads"] for row in rows} == {"1"}
    assert {row["judged_on"] for row in rows} == {"t10k-images-idx3-ubyte.gz"}
    assert {job.recipe["threads"] for job in launched} == {1}
    assert len([job for job in launched if job.kind == "store"]) == 9

    pairs = read(output / "ablation-paired.csv")
    assert len(pairs) == 3 * 2 * 3
    unguided = [row for row in pairs if row["variant"] == "unguided"]
    assert all(-13 < float(row["points"]) < -11 for row in unguided)
    assert all(float(row["bootstrap95_low"]) < float(row["points"]) < float(row["bootstrap95_high"]) for row in pairs)
    assert all(float(row["mcnemar_p"]) < 1e-9 for row in unguided)

    # Twelve points at ten a tenfold: a guided image is worth 10**1.2 unguided ones.
    worth = [
        row for row in read(output / "ablation-worth.csv") if (row["variant"], row["other"]) == ("guided", "unguided")
    ]
    assert [row["bound"] for row in worth] == ["", "at least", "at least"] * 2
    assert float(worth[0]["worth"]) == pytest.approx(10**1.2, rel=0.2)
    equal = [row for row in read(output / "ablation-equal.csv") if row["equal"] == "network evaluations"]
    # Twice the images for the same evaluations win back three of the twelve points.
    points = [float(row["points"]) for row in equal if row["variant"] == "unguided"]
    assert points == pytest.approx([-12 + 10 * np.log10(2)] * 4, abs=1)

    page = (output / PAGE).read_text(encoding="utf-8")
    assert re.search(r"unguided: below at 6 of 6 budgets \(−1[23]\.\d\d to −1[12]\.\d\d\)\.", page)
    assert re.search(r"like guided: .*not resolved at [1-6] of 6 budgets", page)
    assert "What an image is worth" in page and "Seconds to an accuracy" in page and "equal cost" in page
    assert "a &lt;trial&gt;" in page and "<trial>" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page), "it loads something"

    launched.clear()
    assert command_line(arguments)[0] == 0 and not launched
    assert command_line([*arguments, "--seeds", "4"])[0] == 0
    assert {job.recipe["seed"] for job in launched} == {3}


def test_one_seed_resolves_nothing(tmp_path: Path, launched: list[Job], command_line: Call) -> None:
    content = {**AXIS, "grid": {}, "base": ["distillation.steps=20"]}
    arguments = ["ablate", "fashion", "device=cpu", "--axis", axis_file(tmp_path, content), "--seeds", "1"]
    arguments += ["--output", str(tmp_path / "out"), "--csv", str(tmp_path / "t" / "a.csv")]
    code, _, err = command_line([*arguments, "--skip", "floor"])
    assert code == 0, err
    assert "floor" not in {row["variant"] for row in read(tmp_path / "t" / "a.csv")}
    assert command_line([*arguments, "--seeds", "3"])[0] == 0
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "Resolved: unguided −1" in page and "Not resolved: like guided" in page
    assert command_line(arguments)[0] == 0
    assert "one seed, so that nothing is resolved" in (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert [row["t95_low"] for row in read(tmp_path / "t" / "a-paired.csv")] == [""] * 3
    assert not (tmp_path / "t" / "a-worth.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--axis: give one or more"),
        (["--axis", "trm"], "--axis: trm: no axis of this name"),
        (["--axis", "AXIS", "--seeds", "0"], "--seeds: got 0"),
        (["--axis", "AXIS", "--jobs", "0"], "--jobs: got 0"),
        (["--axis", "AXIS", "--csv", "table.txt"], "--csv: table.txt: name a file that ends in .csv"),
        (["--axis", "AXIS", "--labels", "x"], "--labels: given without --images"),
        (["--axis", "AXIS", "--images", "nowhere"], "nowhere"),
        (["--axis", "AXIS", "--output", "held"], "--output: held exists, and is no ablation's folder"),
        (["output=x", "--axis", "AXIS"], "output=x: an ablation has its own; give --output"),
        (["guidance.rho=0", "--axis", "AXIS"], "guidance.rho: got 0"),
        (["--axis", "AXIS", "--skip", "flor"], "--skip: there is no variant flor; take one of unguided, guided"),
        (["--axis", "AXIS", "--skip", "guided"], "--skip: guided is what the others of trial are compared with"),
        (["--axis", "STRANGE"], "--axis: strange: variant bad: guidance.strength: unknown field"),
        (
            ["prior=.", "--axis", "AXIS"],
            "--axis: trial: variant floor: images: floor: prior.path: ",
        ),
    ],
)
def test_refusals_before_anything_is_made(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    launched: list[Job],
    command_line: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.txt").write_text("mine")
    files = {
        "AXIS": axis_file(tmp_path),
        "STRANGE": axis_file(
            tmp_path, {"reference": "a", "variants": {"a": [], "bad": ["guidance.strength=1"]}}, "strange"
        ),
    }
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command_line(["ablate", "fashion", *(files.get(argument, argument) for argument in arguments)])
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and words in err
    assert sorted(tmp_path.rglob("*")) == before and not launched


def test_another_ablation_is_refused(tmp_path: Path, launched: list[Job], command_line: Call) -> None:
    content = {**AXIS, "grid": {}}
    arguments = ["ablate", "fashion", "device=cpu", "--axis", axis_file(tmp_path, content), "--seeds", "1"]
    arguments += ["--output", str(tmp_path / "out")]
    assert command_line(arguments)[0] == 0
    code, _, err = command_line([*arguments, "guidance.rho=0.3"])
    assert code == 2 and "holds another ablation (overrides: ['device=cpu'], now" in err
    # Another axis is no other ablation.
    more = axis_file(tmp_path, {"reference": "a", "variants": {"a": [], "b": ["guidance.rho=0.3"]}}, "more")
    launched.clear()
    code, _, err = command_line([*arguments, "--axis", more])
    assert code == 0, err
    assert [job.recipe["guidance"]["rho"] for job in launched if job.kind != "store"] == [0.3], "a was there already"


@pytest.mark.slow
def test_two_variants_of_the_demo_for_real(tmp_path: Path) -> None:
    content = {
        "reference": "guided",
        "base": ["synthesis.batch_size=20", "synthesis.steps=2", "distillation.steps=10"],
        "grid": {"images": [40, 60]},
        "variants": {"unguided": ["guidance.mode=none"], "guided": []},
    }
    command = [sys.executable, "-m", "diffdfkd.recipes.cli", "ablate", "fashion", "device=cpu", "--seeds", "1"]
    command += ["--axis", axis_file(tmp_path, content), "--output", str(tmp_path / "out"), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "out" / CSV)
    assert [(row["variant"], row["images"]) for row in rows] == [
        ("unguided", "40"),
        ("unguided", "60"),
        ("guided", "40"),
        ("guided", "60"),
    ]
    assert all(float(row["synthesis_seconds"]) > 0 and row["engine"] for row in rows)
    shards = {path.name: path for path in (tmp_path / "out").glob(f"runs/{rows[2]['run']}/synthetic/round-000/*.tar")}
    others = {path.name: path for path in (tmp_path / "out").glob(f"runs/{rows[3]['run']}/synthetic/round-000/*.tar")}
    assert len(shards) == 2 and len(others) == 3
    assert all(path.read_bytes() == others[name].read_bytes() for name, path in shards.items())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*") if path.is_file()}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*") if path.is_file()}
