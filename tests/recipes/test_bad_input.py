"""Every bad input of the corpus: exit code 2, one line that names what is wrong and the cure, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input_cases import CASES as TYPED
from bad_input_cases import Case, command
from diffdfkd.recipes import cli

CASES = [*TYPED]
SMALL = {
    "synthesis": {"images_per_class": 2, "batch_size": 4, "steps": 3},
    "guidance": {"batchnorm_weight": 0.3},
    "rounds": 1,
    "distillation": {"steps": 4, "batch_size": 8},
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def good(tiny_recipe: Path) -> dict[str, Any]:
    """A recipe of one round that takes a second, with absolute paths."""
    recipe = yaml.safe_load(tiny_recipe.read_text()) | SMALL
    recipe["teacher"]["weights"] = str(tiny_recipe.parent / "teacher.safetensors")
    del recipe["cutmix"]
    return recipe


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: exit code, standard output and standard error."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main(arguments)
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, *capfd.readouterr()

    return run


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of all files in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, good: dict[str, Any], tmp_path: Path, call: Call) -> None:
    arguments = case.spoil(tmp_path, yaml.safe_load(yaml.safe_dump(good)))
    before = content(tmp_path)
    code, out, err = call(arguments)
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: {case.begins.replace('{folder}', str(tmp_path))}")
    for words in case.holds:
        assert words.replace("{folder}", str(tmp_path)) in err
    assert (code, out) == (2, "")
    made = content(tmp_path)
    assert {name: made.get(name) for name in before} == before
    assert made.keys() - before.keys() <= {"run/.lock"}
    if case.mended:
        assert call(command(tmp_path, good, name="synthesize"))[0] == 0
