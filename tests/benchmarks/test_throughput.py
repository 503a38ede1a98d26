"""The comparison of ways of making the same images; the runs themselves are small or stand-ins."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdfkd.benchmarks import accuracy, throughput
from diffdfkd.benchmarks.synthesis_run import Synthesis
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import load_recipe


def stand_in(monkeypatch: pytest.MonkeyPatch, **digests: str) -> list[str]:
    """Runs that take no time, plain at 10 images a second and others at 25; their names in order."""
    made: list[str] = []

    def run(way: throughput.Way, overrides: Any, output: Path) -> Synthesis:
        made.append(way.name)
        eager = "engine=eager" in way.overrides
        rate = 10.0 + len(made) % 2 if way.name == "plain" else 25.0
        digest = digests.get(way.name.split(",")[0] if eager else "engines", "same" if eager else "other")
        recipe = load_recipe("fashion", ["threads=3"])
        return Synthesis(rate, writing=0.01 * len(made), wall=3.0, memory=100.0, digest=digest, recipe=recipe)

    monkeypatch.setattr(throughput, "_make", run)
    return made


def test_ways_take_turns_and_are_compared_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stand_in(monkeypatch)
    rows, used = throughput.compare("fashion", "throughput_fashion", "compiled", [], 3)
    assert used.threads == 3
    assert made == ["plain", "plain, engines", "kept", "throughput"] * 4  # once to warm up
    by = {row.way: row for row in rows}
    assert by["plain"].times_plain == 1 and by["throughput"].times_plain == round(25 / 11, 3)
    assert (by["plain"].lowest, by["plain"].highest) == (11, 11)
    assert by["throughput"].writing_share == 0.16 and by["plain"].digest == by["kept"].digest


def test_shards_that_differ_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, kept="changed")
    with pytest.raises(UserError, match="plain, kept: 2 different sets of shards"):
        throughput.compare("fashion", "throughput_fashion", "compiled", [], 1)


def test_what_a_run_says_is_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        throughput.main(["no-such-recipe", "--repetitions", "1"])
    assert left.value.code == 2
    assert "error: plain: no-such-recipe" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        throughput.main(["fashion", "--json", str(tmp_path), "threads=1"])
    assert left.value.code == 2
    assert f"error: --json: {tmp_path} cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    small = ["synthesis.batch_size=4", "synthesis.steps=2", "threads=1"]
    options = ["--engine", "eager", "--images-per-class", "2", "--repetitions", "1", "--json", str(file)]
    throughput.main(["fashion", "throughput_fashion", *small, *options])
    rows = json.loads(file.read_text())["rows"]
    assert [row["way"] for row in rows] == ["plain", "plain, engines", "kept", "throughput"]
    assert all(row["images_per_second"] > 0 and 0 < row["writing_share"] < 1 for row in rows)
    assert rows[0]["digest"] == rows[2]["digest"] != rows[1]["digest"] == rows[3]["digest"]


def test_accuracy_is_paired_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def run(recipe: str, overrides: list[str]) -> float:
        asked.append(overrides)
        seed = int(next(field for field in overrides if field.startswith("seed=")).removeprefix("seed="))
        return 80.0 + seed + (0.5 * seed if "engine=compiled" in overrides else 0.0)

    monkeypatch.setattr(accuracy, "_accuracy", run)
    file = tmp_path / "accuracy.csv"
    accuracy.main(["fashion", "threads=1", "--seeds", "0", "1", "2", "--csv", str(file)])
    assert len(asked) == 6 and len({fields[-1] for fields in asked}) == 6
    assert all("threads=1" in fields for fields in asked)
    lines = file.read_text().splitlines()
    assert lines[0] == "seed,eager,engine,difference,t95"
    # Differences 0, 0.5 and 1: deviation 0.5, quantile 4.303.
    assert lines[1:] == ["0,80.0,80.0,0.0,", "1,81.0,81.5,0.5,", "2,82.0,83.0,1.0,", "mean,81.0,81.5,0.5,1.24"]
