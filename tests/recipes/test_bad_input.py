"""Every bad input of the corpus: exit code 2, one line that names what is wrong and the cure, and nothing is lost."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_cheap_cases import CASES as CHEAP
from bad_engine_cases import CASES as ENGINES
from bad_extra_cases import CASES as EXTRAS
from bad_image_cases import CASES as IMAGES
from bad_input_cases import CASES as TYPED
from bad_input_cases import Call, Case, command, content, copy_run
from bad_network_cases import CASES as NETWORKS
from bad_prior_cases import CASES as PRIORS
from bad_run_cases import CASES as RUNS
from bad_selection_cases import CASES as SELECTIONS

CASES = [*TYPED, *PRIORS, *NETWORKS, *IMAGES, *EXTRAS, *ENGINES, *CHEAP, *SELECTIONS, *RUNS]
JOURNAL = "run/metrics.jsonl"


def test_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case,
    good_recipe: dict[str, Any],
    tmp_path: Path,
    command_line: Call,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    if case in RUNS:
        copy_run(request.getfixturevalue("good_run"), tmp_path / "run")
    for name, value in case.environment:
        monkeypatch.setenv(name, value)
    arguments = case.spoil(tmp_path, yaml.safe_load(yaml.safe_dump(good_recipe)))
    before = content(tmp_path)
    code, out, err = command_line(arguments)
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: {case.begins.replace('{folder}', str(tmp_path))}")
    for words in case.holds:
        assert words.replace("{folder}", str(tmp_path)) in err
    assert (code, out) == (2, "")
    made = content(tmp_path)
    if JOURNAL in before:  # a command may have begun, and said so
        assert made.get(JOURNAL, b"").startswith(before[JOURNAL])
        before[JOURNAL] = made[JOURNAL]
    assert {name: made.get(name) for name in before} == before
    new = {name for name in made.keys() - before.keys() if not name.startswith("run/tensorboard/")}
    assert new <= {"run/.lock", "new/.lock"}
    if case.mended:
        assert command_line(command(tmp_path, good_recipe, name="synthesize"))[0] == 0
