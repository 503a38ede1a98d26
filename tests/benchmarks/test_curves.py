"""Pictures of an ablation's table."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from diffdfkd.benchmarks.curves import main
from diffdfkd.benchmarks.tables import write_csv

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two curves over images at two numbers of steps, and fresh draws; seed 1 is two points above seed 0."""
    rows = []
    for variant, gain in (("guided", 0.1), ("un<guided>", 0.0)):
        for images in (100, 1000):
            for steps in (10, 20):
                for seed in (0, 1):
                    accuracy = 0.5 + gain + images / 10_000 + steps / 1000 + 0.02 * seed
                    rows.append(_row(variant, images, steps, seed, accuracy))
    rows += [_row("strong floor", 128 * steps, steps, seed, 0.55) for steps in (10, 20) for seed in (0, 1)]
    write_csv(tmp_path / "table.csv", rows)
    return tmp_path / "table.csv"


def _row(variant: str, images: int, steps: int, seed: int, accuracy: float) -> dict[str, object]:
    return {
        "axis": "budget",
        "variant": variant,
        "seed": seed,
        "images": images,
        "steps": steps,
        "sampling_steps": 0 if "floor" in variant else 12,
        "student_accuracy": accuracy,
        "synthesis_seconds": 0 if "floor" in variant else images / 20,
        "distillation_seconds": steps / 10,
    }


def _draw(table: Path, *options: str) -> ElementTree.Element:
    output = table.with_suffix(".svg")
    main([str(table), "--axis", "budget", "--output", str(output), *options])
    return ElementTree.fromstring(output.read_text())


def _words(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}title")]


def test_points_are_means_over_seeds_and_the_floor_is_a_level(table: Path) -> None:
    root = _draw(table, "--steps", "10")
    assert _words(root) == ["guided: 63.00", "guided: 72.00", "un<guided>: 53.00", "un<guided>: 62.00"]
    labels = [element.text for element in root.iter(f"{SVG}text")]
    assert "strong floor (level)" in labels and "images" in labels
    # Of two seeds two points apart the standard deviation is sqrt(2) points; 63 and 72 are nine points apart.
    places = [float(circle.get("cy", "")) for circle in root.iter(f"{SVG}circle")]
    pixels = (places[0] - places[1]) / 9
    upright = [
        _ends(bar) for bar in root.iter(f"{SVG}polyline") if bar.get("opacity") and _ends(bar)[0] == _ends(bar)[2]
    ]
    assert len(upright) == 4
    for (_, low, _, high), place in zip(upright, places, strict=True):
        assert (low - place) / pixels == pytest.approx(2**0.5, abs=0.01)
        assert (place - high) / pixels == pytest.approx(2**0.5, abs=0.01)


def _ends(bar: ElementTree.Element) -> list[float]:
    return [float(number) for number in re.split("[ ,]", bar.get("points", ""))]


def test_of_one_seed_there_is_no_bar(table: Path) -> None:
    lines = [line for line in table.read_text().splitlines() if line.split(",")[2] != "1"]
    table.write_text("\n".join(lines))
    root = _draw(table, "--steps", "10")
    assert _words(root)[0] == "guided: 62.00"
    assert not [bar for bar in root.iter(f"{SVG}polyline") if bar.get("opacity")]


def test_over_steps_the_floor_is_a_curve(table: Path) -> None:
    root = _draw(table, "--across", "steps", "--images", "100", "--title", "a & b")
    assert _words(root) == [
        *("guided: 63.00", "guided: 64.00"),
        *("un<guided>: 53.00", "un<guided>: 54.00"),
        *("strong floor: 55.00", "strong floor: 55.00"),
    ]
    assert root.get("aria-label") == "a & b"


def test_over_seconds_every_budget_lies_at_its_own(table: Path) -> None:
    root = _draw(table, "--across", "seconds", "--steps", "20")
    places = [round(float(circle.get("cx", "")), 1) for circle in root.iter(f"{SVG}circle")]
    # 7 and 52 seconds for both, and the floor's two seconds.
    assert places == [places[0], places[1]] * 2 + [places[4]] and places[4] < places[0] < places[1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--axis", "terms"], "--axis: "),
        ([], "--steps: the rows have 10, 20; give one of them"),
        (["--across", "steps"], "--images: the rows have 100, 1000; give one of them"),
        (["--across", "seconds"], "--steps: the rows have 10, 20; give one of them"),
        (["--steps", "11"], "--steps: 11: no row of budget has it; there are 10, 20"),
        (["--output", "picture.png"], "name a file that ends in .svg"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], problem: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        _draw(table, *options)
    assert leaving.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n"])
def test_what_is_no_table_is_refused(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "other.csv"
    if content is not None:
        table.write_text(content)
    with pytest.raises(SystemExit) as leaving:
        _draw(table)
    assert leaving.value.code == 2 and "error: TABLE: " in capsys.readouterr().err
