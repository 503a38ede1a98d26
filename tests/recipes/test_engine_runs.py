"""Commands that go through on engines: built ahead, used by a run, frozen into it."""

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from bad_input_cases import Call, Recipe, command

from diffdfkd.engine.backends import serve
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes import engines

ROUNDS = {
    "rounds": 2,
    "engine": {"unet": "onnxruntime", "chain": "onnxruntime"},
    "guidance": {"batchnorm_weight": 0.3, "adversarial_weight": 1.0},
}


@pytest.mark.slow
def test_engines_are_built_ahead_and_run(good_recipe: Recipe, tmp_path: Path, command_line: Call) -> None:
    recipe = {**good_recipe, **ROUNDS}
    cache = f"engine.cache={tmp_path / 'cache'}"
    code, out, err = command_line(command(tmp_path, recipe, cache, name="build"))
    assert code == 0, err
    heads = [line for line in out.splitlines() if not line.startswith("  ")]
    assert [head.split(": ")[0] for head in heads] == ["unet", "chain", "chain with the student"]
    assert all(": onnxruntime, float32: built in " in head and "differs from eager by " in head for head in heads)
    assert out.count("  runs on this machine") == 3 and str(tmp_path / "cache" / "onnxruntime") in out
    for again in range(2):
        code, out, err = command_line(command(tmp_path, recipe, cache))
        assert code == 0, err
        content = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
        assert [content["engine"][stage] for stage in ("unet", "chain")] == ["onnxruntime"] * 2, again
    assert json.loads((tmp_path / "run" / "result.json").read_text())["student_accuracy"] is not None
    code, out, _ = command_line(command(tmp_path, recipe, cache, name="build"))
    assert code == 0 and out.count("was there already") == 3


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt-rtx is not installed")
def test_plans_are_built_ahead_and_say_where_they_run(good_recipe: Recipe, tmp_path: Path, command_line: Call) -> None:
    recipe = {**good_recipe, "engine": {"unet": "tensorrt-rtx", "chain": "eager", "capabilities": ["SM86", "SM89"]}}
    code, out, err = command_line(command(tmp_path, recipe, f"engine.cache={tmp_path / 'cache'}", name="build"))
    assert code == 0, err
    first, where, file = out.splitlines()
    assert first.startswith("unet: tensorrt-rtx, float32: built in ") and "not compared with eager yet" in first
    assert where.startswith("  runs on GPUs of compute capability 8.6 or 8.9") and file.endswith("plan.engine")


@pytest.mark.parametrize("chosen", [True, False])
def test_chain_that_cannot_be_had_with_the_student(
    good_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chosen: bool
) -> None:
    """Found out before the first round: what ``auto`` took gives way, what is named is an error."""
    recipe = load_recipe({**good_recipe, **ROUNDS}, ["engine.unet=eager", "device=cpu"])

    def without_student(subject: Any, *_: Any) -> Any:
        if subject.student is not None:
            raise UserError("engine.chain: onnxruntime cannot be had: it differs")
        return SimpleNamespace(runner=SimpleNamespace(close=lambda: None))

    monkeypatch.setattr(serve, "open_engine", without_student)
    both = [("chain", SimpleNamespace(student=student)) for student in (None, object())]
    monkeypatch.setattr(engines, "wanted", lambda *_: both)
    with caplog.at_level(logging.WARNING):
        if not chosen:
            with pytest.raises(UserError, match="it differs"):
                engines.build_engines(recipe, None, None)  # type: ignore[arg-type]
            return
        settled = engines.build_engines(recipe, None, None, {"chain"})  # type: ignore[arg-type]
    assert (settled.engine.unet, settled.engine.chain) == ("eager", "eager")
    assert "it differs; so guidance is eager, in all rounds alike" in caplog.text
