"""The table of engines, for a prior alone and on a machine with none but eager and ONNX Runtime."""

import json
from pathlib import Path

import pytest
import torch

from diffdfkd.benchmarks import engines
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.parity import Parity, Refused
from diffdfkd.engine.runner import NoEngine
from diffdfkd.recipes.cli import main

SMALL = ["synthesis.batch_size=2", "threads=1", "device=cpu"]


def test_a_prior_alone(
    tiny_prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = (("eager", torch.float32), ("eager", torch.bfloat16), ("onnxruntime", torch.bfloat16))
    monkeypatch.setattr(engines, "CPU", few)
    file = tmp_path / "engines.json"
    with pytest.raises(SystemExit) as left:
        main(["engines", str(tiny_prior), *SMALL, "--json", str(file)])
    assert left.value.code == 0
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert [(row["stage"], row["engine"], row["precision"]) for row in rows] == [
        (stage, engine, str(precision).removeprefix("torch."))
        for stage in ("unet", "chain", "vjp")
        for engine, precision in few
    ]
    for row in rows:
        if row["engine"] == "onnxruntime":
            assert not row["usable"] and "ONNX Runtime has no bfloat16 on a CPU" in row["reason"]
            assert row["calls_per_second"] is row["times_eager"] is row["peak_memory_mib"] is None
        else:
            assert row["usable"] and row["reason"] is None
            rates = row["calls_per_second"]
            assert 0 < rates["p10"] <= rates["p50"] <= rates["p90"] and row["peak_memory_mib"] >= 0
    lowered = next(row for row in rows if row["stage"] == "chain" and row["precision"] == "bfloat16")
    assert 0 < lowered["parity_relative"] < 0.04 and 0.97 < lowered["cosine"] <= 1
    assert rows[0]["times_eager"] == 1
    assert "onnxruntime" in capsys.readouterr().out


def test_what_computes_something_else_has_a_row_with_its_figures(
    tiny_prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(make: object, engine: str, precision: torch.dtype, settings: object) -> object:
        parity = Parity((2, 1), 3.0, 0.5, None, None, None, "output, batch of 2: relative error 5.0e-01")
        raise Refused("unet: openvino differs from eager", parity) if engine == "openvino" else NoEngine("no compiler")

    subject = engines.subject_from(str(tiny_prior), SMALL)
    monkeypatch.setattr(
        engines, "CPU", (("eager", torch.float32), ("openvino", torch.float32), ("compiled", torch.float32))
    )
    real = engines.build
    monkeypatch.setattr(engines, "build", lambda *given: real(*given) if given[1] == "eager" else refuse(*given))
    eager, wrong, missing = engines.measure(subject, "unet", engines.run_settings(subject.recipe))
    assert eager.usable and not wrong.usable and not missing.usable
    assert (wrong.parity_max_abs, wrong.parity_relative) == (3.0, 0.5) and "differs from eager" in str(wrong.reason)
    assert missing.parity_relative is None and "no compiler" in str(missing.reason)


def test_a_folder_that_is_no_prior(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prior"):
        engines.subject_from(str(tmp_path), SMALL)


def test_a_batch_beyond_all_memory(tiny_prior: Path) -> None:
    with pytest.raises(UserError, match=r"synthesis.batch_size: .* GiB"):
        engines.subject_from(str(tiny_prior), [*SMALL, "synthesis.batch_size=100000000000"])
