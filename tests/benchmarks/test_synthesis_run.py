"""What one synthesis in a process of its own comes to, by its journal and its last words."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffdfkd.benchmarks import synthesis_run
from diffdfkd.benchmarks.synthesis_run import TooLarge, synthesize
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import LESS_MEMORY, fitting, less_memory, refuse_more
from diffdfkd.engine.painter import SMALLER
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.run_folder import RunFolder


def ends(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str = "", before: Callable[[], None] | None = None
) -> None:
    """Runs that leave with a status and some words."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if before is not None:
            before()
        return subprocess.CompletedProcess(command, status, "", f"progress 50 %\n{said}\n")

    monkeypatch.setattr(synthesis_run.subprocess, "run", run)


def words(field: str, reason: str) -> str:
    with pytest.raises(UserError) as raised, fitting(field, "a batch of 9 images on the cpu", SMALLER):
        raise RuntimeError(reason)
    return str(raised.value)


def least(field: str) -> str:
    with pytest.raises(UserError) as raised:
        refuse_more(field, "a batch of 9 images", 2**40, 2**30, SMALLER)
    return str(raised.value)


LARGE = {
    "batch": words("synthesis.batch_size", "DefaultCPUAllocator: can't allocate memory"),
    "least": least("synthesis.batch_size"),
    "engine": f"engine.chain: chain: compiled does not fit into memory; {LESS_MEMORY}",
    "engine's call": f"engine.unet: unet: fails when it is called: x{less_memory(RuntimeError('bad_alloc'))}",
    "unexpected": "unexpected RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
}
OTHER = {
    "prior": words("prior.path", "DefaultCPUAllocator: can't allocate memory"),
    "teacher": words("teacher.architecture", "DefaultCPUAllocator: can't allocate memory"),
    "recipe": "cutmix.every: CutMix needs a partner",
}


@pytest.mark.parametrize("who", LARGE)
def test_a_batch_that_is_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str) -> None:
    ends(monkeypatch, 2, f"error: {LARGE[who]}")
    with pytest.raises(TooLarge) as raised:
        synthesize("fashion", [], tmp_path, name="nine")
    assert str(raised.value) == f"nine: {LARGE[who]}"


@pytest.mark.parametrize("who", OTHER)
def test_another_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str) -> None:
    ends(monkeypatch, 2, f"error: {OTHER[who]}")
    with pytest.raises(UserError) as raised:
        synthesize("fashion", [], tmp_path, name="nine")
    assert str(raised.value) == f"nine: {OTHER[who]}" and not isinstance(raised.value, TooLarge)


def test_no_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        synthesis_run.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", " \n")
    )
    with pytest.raises(UserError, match=r"^nine: no word$"):
        synthesize("fashion", [], tmp_path, name="nine")


@pytest.mark.parametrize(("status", "large"), [(-9, True), (-11, False)])
def test_a_run_that_was_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, large: bool) -> None:
    ends(monkeypatch, status)
    with pytest.raises(UserError) as raised:
        synthesize("fashion", [], tmp_path, name="nine")
    assert str(raised.value) == f"nine: ended by signal {-status}"
    assert isinstance(raised.value, TooLarge) == large


@pytest.mark.parametrize(
    ("whole", "rate", "writing"), [(3, 79 / 4, 0.1), (1, 8 / 2, 0.05), (0, 40 / 9, 1 / 9)], ids=str
)
def test_rates_are_of_whole_shards_after_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: int, rate: float, writing: float
) -> None:
    """Of what there is where no other is whole, or there is but one."""
    output = tmp_path / "run"

    def shard(images: int, dropped: int, seconds: float, writing: float) -> dict[str, Any]:
        counts = {"images": images, "dropped": dropped}
        return {
            "event": "shard",
            "round": 0,
            "shard": 0,
            **counts,
            "seconds": seconds,
            "writing_seconds": writing,
            "peak_memory_mib": 300.0,
        }

    rows = [
        {"event": "synthesize", "time": 10.0, "seconds_before": 4.0},
        *[shard(40, 0, 9.0, 1.0), shard(40, 0, 2.0, 0.1), shard(39, 1, 2.0, 0.3)][: max(whole, 1)],
        *[shard(8, 0, 2.0, 0.1)][:whole],
        {"event": "done", "time": 30.0, "peak_memory_mib": 200.0},
    ]

    def before() -> None:
        folder = output / "synthetic" / "round-000"
        folder.mkdir(parents=True)
        (folder / "shard-00000.tar").write_bytes(b"images")
        RunFolder(load_recipe("fashion", ["threads=1"]), output, {}, None, grown=False, mended=False).freeze()
        lines = (json.dumps({"time": 20.0, **row}) for row in rows)
        (output / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))

    ends(monkeypatch, 0, before=before)
    made = synthesize("fashion", [], output, name="five")
    assert made.rate == pytest.approx(rate) and made.writing == pytest.approx(writing)
    assert (made.wall, made.memory) == (24.0, 300.0)
    assert made.recipe.threads == 1
