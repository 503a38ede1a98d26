"""The search for the largest batch, on stand-ins for runs, and one real run."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdfkd.benchmarks import batch_size
from diffdfkd.benchmarks.synthesis_run import Synthesis, TooLarge
from diffdfkd.engine.combinations import round_samples
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe


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


def stand_in(monkeypatch: pytest.MonkeyPatch, mib: float, machine: float, spare: int = 1) -> list[Recipe]:
    """Runs that take so many MiB an image, on a machine of so many; their recipes in order.

    They make ``spare`` images of each class at most beyond the four shards.
    """
    asked: list[Recipe] = []

    def run(recipe: str, overrides: list[str], output: Path, *, name: str) -> Synthesis:
        try:
            asked.append(load_recipe(recipe, [*overrides, "device=cpu"]))
        except UserError as reason:
            raise UserError(f"{name}: {reason}") from None
        synthesis = asked[-1].synthesis
        batch = synthesis.batch_size
        assert output.name == str(batch) and synthesis.batches_per_shard == 1
        classes = len(asked[-1].teacher.classes)
        assert 0 <= round_samples(asked[-1], 0) - batch_size.SHARDS * batch < classes * spare, asked[-1].synthesis
        # Of the batches before nothing is left.
        cache = Path(str(asked[-1].engine.cache))
        assert cache == output.parent / "cache" and not any(output.parent.iterdir())
        for left in (cache, output):
            left.mkdir()
        if batch * mib > machine:
            raise TooLarge(f"{name}: synthesis.batch_size: a batch of {batch} does not fit into memory")
        # Slower again where the cache ends.
        return Synthesis(min(batch, 150) - batch / 100, 0.0, 1.0, batch * mib, "digest", asked[-1])

    monkeypatch.setattr(batch_size, "synthesize", run)
    return asked


def test_rows_and_the_last_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = stand_in(monkeypatch, mib=10, machine=5000)
    file = tmp_path / "batches.json"
    batch_size.main(["fashion", "--json", str(file), "threads=3", "engine=eager", "engine.precision=float32"])
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert [row["batch"] for row in rows] == [100, 200, 400, 500, 600, 800]
    assert [row["fits"] for row in rows] == [row["batch"] <= 500 for row in rows]
    assert all((row["peak_memory_mib"] is None) == (not row["fits"]) for row in rows)
    assert all(row["engines"] == ("eager, eager" if row["fits"] else None) for row in rows)
    assert content["conditions"]["threads"] == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "largest that fits: synthesis.batch_size=500 (600 does not); fastest: 200"
    assert asked[0].threads == 3 and asked[0].synthesis.images_per_class == 40


def test_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, mib=10, machine=5000)
    batch_size.main(["fashion", "--memory-mib", "600"])
    said = capsys.readouterr().out.splitlines()
    assert "batch 100: 99.0 images a second, 1,000 MiB: too much (it takes 1,000 of 600 MiB)" in said
    assert "largest that fits: synthesis.batch_size=50 (62 does not); fastest: 50" in said


@pytest.mark.parametrize(("most", "found"), [(300, 300), (100, 100), (64, 64)])
def test_a_bound_that_is_not_memorys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], most: int, found: int
) -> None:
    asked = stand_in(monkeypatch, mib=10, machine=5000)
    batch_size.main(["fashion", "--most", str(most)])
    assert f"synthesis.batch_size={found} (no larger one was tried)" in capsys.readouterr().out
    assert max(recipe.synthesis.batch_size for recipe in asked) == most


def test_settings_that_need_more_images_or_rounds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the recipe's own head for a thorough run, and a part that is held out."""
    asked = stand_in(monkeypatch, mib=1, machine=20)
    thorough = ["rounds=10", "guidance.adversarial_weight=1", "distillation.holdout=500"]
    batch_size.main(["cifar10_sd15", *thorough, "teacher.weights=none.safetensors"])
    assert all(recipe.guidance.adversarial_weight == 1 and recipe.rounds == 10 for recipe in asked)


def test_batches_that_the_recipe_forbids_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With CutMix within a class those that divide the ten classes, and 1."""
    asked = stand_in(monkeypatch, mib=100, machine=1300)
    batch_size.main(["fashion", "cutmix.every=2", "synthesis.batch_size=20", "--most", "30"])
    assert [recipe.synthesis.batch_size for recipe in asked] == [20, 9, 14, 11, 12]
    assert "synthesis.batch_size=12 (14 does not)" in capsys.readouterr().out
    stand_in(monkeypatch, mib=1000, machine=1500)
    file = tmp_path / "batches.json"
    with pytest.raises(SystemExit) as left:
        batch_size.main(["fashion", "cutmix.every=2", "synthesis.batch_size=8", "--json", str(file)])
    assert left.value.code == 2
    content = json.loads(file.read_text())
    assert [row["batch"] for row in content["rows"]] == [3, 4, 8] and content["conditions"]["processor"]
    assert capsys.readouterr().err.splitlines()[-1].endswith("a batch of 3 does not fit into memory)")


def test_classes_enough_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CutMix within a class needs two images of it, however few the batch asks for."""
    asked = stand_in(monkeypatch, mib=1, machine=10**6, spare=2)
    classes = [f"class {index}" for index in range(100)]
    within = [
        "cutmix.every=4",
        "cutmix.partner=within",
        f"teacher.classes={json.dumps(classes)}",
        "synthesis.words=null",
    ]
    batch_size.main(["fashion", *within, "synthesis.batch_size=8", "--most", "8"])
    assert [recipe.synthesis.images_per_class for recipe in asked] == [2]


def test_what_was_found_is_kept_when_the_search_is_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, mib=10, machine=5000)
    found = batch_size.synthesize

    def interrupted(*given: Any, **named: Any) -> Synthesis:
        if given[2].name == "400":
            raise KeyboardInterrupt
        return found(*given, **named)

    monkeypatch.setattr(batch_size, "synthesize", interrupted)
    file = tmp_path / "batches.json"
    with pytest.raises(KeyboardInterrupt):
        batch_size.main(["fashion", "--json", str(file)])
    assert [row["batch"] for row in json.loads(file.read_text())["rows"]] == [100, 200]


def test_another_failure_ends_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, mib=10, machine=5000)
    found = batch_size.synthesize

    def full(*given: Any, **named: Any) -> Synthesis:
        if given[2].name == "200":
            raise UserError(f"{named['name']}: output: no room on its disk")
        return found(*given, **named)

    monkeypatch.setattr(batch_size, "synthesize", full)
    with pytest.raises(SystemExit) as left:
        batch_size.main(["fashion"])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: a batch of 200: output: no room on its disk" and not said.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["fashion", "--memory-mib", "1"], "no batch fits into memory (it takes 10 of 1 MiB)"),
        (["fashion", "--memory-mib", "0"], "--memory-mib: got 0; at least 1 expected"),
        (["fashion", "--memory-mib", "nan"], "--memory-mib: got nan; at least 1 expected"),
        (["fashion", "--most", "0"], "--most: got 0; at least 1 expected"),
        (["no-such-recipe"], "no-such-recipe"),
        (["fashion", "synthesis.batch_size=0"], "synthesis.batch_size"),
        (["fashion", "--json", "{folder}"], "--json: {folder} cannot be written; choose another file"),
    ],
    ids=str,
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: list[str],
    said: str,
) -> None:
    asked = stand_in(monkeypatch, mib=10, machine=5000)
    with pytest.raises(SystemExit) as left:
        batch_size.main([argument.format(folder=tmp_path) for argument in given])
    assert left.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.format(folder=tmp_path) in errors[0]
    assert not asked or given[-1] == "1"


@pytest.mark.slow
def test_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batches.json"
    small = ["synthesis.batch_size=4", "synthesis.steps=2", "threads=1", "engine=eager", "engine.precision=float32"]
    batch_size.main(["fashion", *small, "--most", "8", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["fits"]) for row in rows] == [(4, True), (8, True)]
    assert all(row["images_per_second"] > 0 and row["peak_memory_mib"] > 100 for row in rows)
    assert all(row["engines"] == "eager, eager" for row in rows)
    assert "largest that fits: synthesis.batch_size=8" in capsys.readouterr().out
