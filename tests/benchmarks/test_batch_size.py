"""The search for the largest batch, on stand-ins for runs, and one real run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diffdfkd.benchmarks import batch_size, synthesis_run
from diffdfkd.benchmarks.synthesis_run import Synthesis, TooLarge, synthesize
from diffdfkd.engine.errors import UserError


@pytest.mark.parametrize("start", [1, 7, 100, 1000])
@pytest.mark.parametrize("fitting", [0, 1, 2, 3, 99, 100, 333, 4096, 10**6])
def test_the_largest_is_found(start: int, fitting: int) -> None:
    seen: list[int] = []

    def tried(batch: int) -> bool:
        assert batch not in seen and 1 <= batch <= 4096
        seen.append(batch)
        return batch <= fitting

    found = batch_size.search(start, 4096, tried)
    if fitting == 0:
        assert found is None and seen[-1] == 1
        return
    assert found is not None and found in seen and found <= fitting
    if fitting >= 4096:
        assert found == 4096
    else:
        assert fitting < max(batch_size.NEAR * found, found + 1) + 1
        assert any(batch > fitting for batch in seen)
    assert len(seen) <= 20


def stand_in(monkeypatch: pytest.MonkeyPatch, mib: float, machine: float) -> list[list[str]]:
    """Runs that take so many MiB an image, on a machine of so many; their overrides in order."""
    asked: list[list[str]] = []

    def run(recipe: str, overrides: list[str], output: Path, *, name: str) -> Synthesis:
        asked.append(list(overrides))
        batch = int(output.name)
        assert f"synthesis.batch_size={batch}" in overrides
        if batch * mib > machine:
            raise TooLarge(f"{name}: error: synthesis.batch_size: a batch of {batch} does not fit into memory")
        # Slower again where the cache ends.
        return Synthesis(min(batch, 150) - batch / 100, 0.0, 1.0, batch * mib, "digest")

    monkeypatch.setattr(batch_size, "synthesize", run)
    return asked


def test_rows_and_the_last_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = stand_in(monkeypatch, mib=10, machine=5000)
    file = tmp_path / "batches.json"
    batch_size.main(["fashion", "threads=1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["batch"] for row in rows] == [100, 200, 400, 500, 600, 800]
    assert [row["fits"] for row in rows] == [row["batch"] <= 500 for row in rows]
    assert all((row["peak_memory_mib"] is None) == (not row["fits"]) for row in rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "largest that fits: synthesis.batch_size=500; fastest: 200"
    assert "threads=1" in asked[0] and "synthesis.images_per_class=40" in asked[0]


def test_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, mib=10, machine=5000)
    batch_size.main(["fashion", "--memory-mib", "600"])
    said = capsys.readouterr().out.splitlines()
    assert "batch 100: 99.0 images a second, 1,000 MiB: too much (it takes 1,000 of 600 MiB)" in said
    assert "largest that fits: synthesis.batch_size=50; fastest: 50" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["fashion", "--memory-mib", "1"], "not even one image fits into memory"),
        (["fashion", "--memory-mib", "0"], "--memory-mib: got 0; at least 1 expected"),
        (["fashion", "--memory-mib", "nan"], "--memory-mib: got nan; at least 1 expected"),
        (["fashion", "--most", "0"], "--most: got 0; at least 1 expected"),
        (["no-such-recipe"], "no-such-recipe"),
        (["fashion", "synthesis.batch_size=0"], "synthesis.batch_size"),
    ],
    ids=str,
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    stand_in(monkeypatch, mib=10, machine=5000)
    with pytest.raises(SystemExit) as left:
        batch_size.main(given)
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize(
    ("status", "said", "large"),
    [
        (2, "error: synthesis.batch_size: a batch of 9 images on the cpu does not fit into memory (x); y", True),
        (2, "error: synthesis.batch_size: a batch of 9 images needs 9 GiB of memory at the very least, and", True),
        (-9, "", True),
        (2, "error: prior: no such folder", False),
        (1, "", False),
    ],
)
def test_what_a_failed_run_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, said: str, large: bool
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status, "", f"progress\n{said}\n")

    monkeypatch.setattr(synthesis_run.subprocess, "run", run)
    with pytest.raises(UserError, match=r"^nine: ") as raised:
        synthesize("fashion", [], tmp_path, name="nine")
    assert isinstance(raised.value, TooLarge) == large


@pytest.mark.slow
def test_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batches.json"
    small = ["synthesis.batch_size=4", "synthesis.steps=2", "threads=1", "engine=eager", "engine.precision=float32"]
    batch_size.main(["fashion", *small, "--most", "8", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["fits"]) for row in rows] == [(4, True), (8, True)]
    assert all(row["images_per_second"] > 0 and row["peak_memory_mib"] > 100 for row in rows)
    assert "largest that fits: synthesis.batch_size=8" in capsys.readouterr().out
