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
        ("sys.stderr.write('RuntimeError: bad_alloc\\nframe #1: x'); sys.exit(1)", "(RuntimeError: bad_alloc)", True),
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


@pytest.mark.slow
def test_a_package_that_lacks_memory_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = stand_in(rows=512)
    compiled.compile_stage(stage, tmp_path, tmp_path)
    *before, last = compiled.TRIAL.splitlines()
    call = last.strip().removesuffix("(*inputs)")
    bound = (
        *("import resource, torch._inductor", f"call = {call}"),
        "held = [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmData')][0] * 1024",
        *("resource.setrlimit(resource.RLIMIT_DATA, (held + 2**16,) * 2)", "call(*inputs)"),
    )
    monkeypatch.setattr(compiled, "TRIAL", "\n".join([*before[:-1], "torch.set_num_threads(1)", *bound]))
    with pytest.raises(NoEngine, match=r"can't allocate memory.*synthesis\.batch_size"):
        compiled._refuse_crash(tmp_path / compiled.PACKAGE, stage)


def test_the_compilers_folder_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "before")
    with compiled.working_in(tmp_path):
        assert os.environ[compiled.VARIABLE] == str(tmp_path)
    assert os.environ[compiled.VARIABLE] == "before"
