"""A compiled package that does not run is found out before a run takes it."""

import os
from pathlib import Path

import pytest
from stand_in_stages import stand_in

from diffdfkd.engine.backends import compiled
from diffdfkd.engine.memory import LESS_MEMORY
from diffdfkd.engine.runner import NoEngine


@pytest.mark.parametrize(
    ("what", "how", "memory"),
    [
        ("os.kill(os.getpid(), 11)", "signal 11", False),
        ("os.kill(os.getpid(), 9)", "signal 9", True),
        ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', "can't allocate memory", True),
        ("sys.exit('no such symbol')", "no such symbol", False),
        ("sys.exit(3)", "no word", False),
    ],
)
def test_a_package_that_does_not_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, how: str, memory: bool
) -> None:
    monkeypatch.setattr(compiled, "TRIAL", f"import os, sys\n{what}")
    with pytest.raises(NoEngine, match="the compiled package does not run here") as raised:
        compiled._refuse_crash(tmp_path / compiled.PACKAGE, stand_in())
    assert how in str(raised.value) and (LESS_MEMORY in str(raised.value)) == memory
    assert not raised.value.lasting


def test_the_compilers_folder_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "before")
    with compiled.working_in(tmp_path):
        assert os.environ[compiled.VARIABLE] == str(tmp_path)
    assert os.environ[compiled.VARIABLE] == "before"
