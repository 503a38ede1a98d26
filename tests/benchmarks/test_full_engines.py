"""The steps of the measurement, on small stages; the full ones are measured on demand."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from stand_in_stages import open_prior, stand_in

from diffdfkd.benchmarks import full_engines, full_sd15
from diffdfkd.benchmarks.full_engines import PLAN, Asked, apart, main, measure, stage_of

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def asked(stage: str = "unet", precision: str = "float16") -> Asked:
    return Asked(stage, precision, rows=4, teacher_size=32, capabilities=("SM86", "SM89"))


@pytest.mark.parametrize(
    ("precision", "parity", "steps"),
    [
        ("float16", True, ["export", "parity", "build"]),
        ("float16", False, ["export", "build"]),
        ("bfloat16", True, ["export", "build"]),
    ],
)
def test_figures_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, parity: bool, steps: list[str]
) -> None:
    monkeypatch.setattr(full_engines, "stage_of", lambda asked: stand_in(getattr(torch, precision)))
    monkeypatch.setattr(full_engines, "apart", lambda step, *values: (step(*values), {"peak_mib": 7}))
    result = measure(asked(precision=precision), tmp_path, parity=parity)
    assert json.loads(json.dumps(result)) is not None
    assert [name for name, value in result.items() if isinstance(value, dict) and "peak_mib" in value] == steps
    assert all(result[name]["peak_mib"] == 7 and result[name]["seconds"] >= 0 for name in steps)
    assert result["export"]["bytes"] == {"model.onnx": (tmp_path / "model.onnx").stat().st_size}
    assert result["build"]["bytes"] == (tmp_path / PLAN).stat().st_size
    assert result["build"]["capabilities"] == ["SM86", "SM89"] and result["build"]["version"] == rtx.__version__
    if "parity" in steps:
        assert result["parity"]["fault"] is None and 0 < result["parity"]["relative"] < 1e-2
        assert result["parity"]["rows"] == (4,)


def test_account_is_that_of_a_process_of_its_own() -> None:
    process, account = apart(os.getpid)
    assert process != os.getpid()
    size = 2**27
    given, more = apart(len, bytes(size))
    assert given == size and more["peak_mib"] - account["peak_mib"] > 0.9 * size / 2**20
    assert account["cpu_seconds"] > 0
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "what a step raises")


@pytest.mark.parametrize("name", full_engines.STAGES)
def test_stages_are_those_of_the_prior(tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(full_sd15, "build_prior", lambda dtype: open_prior(tiny_sd1, dtype))
    stage = stage_of(asked(name, "bfloat16"))
    assert (stage.name, stage.precision, stage.specification.range) == (name, torch.bfloat16, (4, 4, 4))
    assert stage.examples(4, 0)[0].shape == (4, 4, 8, 8)
    assert stage_of(asked(name, "bfloat16")).digest == stage.digest


def test_capability_that_there_is_not_is_refused_before_the_export(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["full_engines", "--capability", "SM90", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="cannot build for SM90; it can for SM75, SM80, SM86"):
        main()
    assert not list(tmp_path.iterdir())
