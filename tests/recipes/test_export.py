"""Student, ONNX file and card of a run: there, usable as the card says, and made again where they are lost."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdfkd.engine import onnx_export
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.student_file import read_student
from diffdfkd.recipes import export as module
from diffdfkd.recipes.export import export
from diffdfkd.recipes.run import run
from diffdfkd.recipes.run_folder import claim

Finished = tuple[Path, dict[str, Any]]


@pytest.fixture
def copy(finished_run: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run[0], tmp_path / "copy"))


def refused(*_: Any, **__: Any) -> Any:
    raise onnx_export.NotExportable("no operator for it")


def test_run_leaves_a_student_that_is_used_without_its_recipe(finished_run: Finished) -> None:
    folder, result = finished_run
    student = read_student(folder / "student" / "student.safetensors")
    assert student.classes == ["T-shirt/top", "Bag", "Coat", "<b>Shoe</b>"]
    assert student(torch.rand(2, 1, 28, 28)).shape == (2, 4)
    onnx = result["onnx"]
    assert onnx["bytes"] == (folder / "student" / "student.onnx").stat().st_size
    assert onnx["max_rel"] < 1e-4 and onnx["images"] == sum(onnx_export.BATCHES) + 4
    assert result["licences"] == {"prior": "cc0-1.0", "teacher": None, "test images": None}
    assert sum(result["synthetic_per_class"].values()) == result["images"] == 32
    assert result["alarms"] == [] or {"kind", "message"} <= result["alarms"][0].keys()
    assert result["diversity"]["images"] == 32


def test_snippets_of_the_card_run(finished_run: Finished) -> None:
    pytest.importorskip("onnxruntime")
    folder = finished_run[0] / "student"
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True, capture_output=True, text=True)
        assert re.fullmatch(r"\[('.+?'(, )?){4}\]\n", done.stdout)


@pytest.mark.parametrize("lost", [["student.onnx"], ["README.md"], ["student.onnx", "README.md"]])
def test_lost_files_of_a_finished_run_are_made_again_without_a_new_run(
    copy: Path, tiny_recipe: Path, finished_run: Finished, lost: list[str]
) -> None:
    journal = (copy / "metrics.jsonl").read_bytes()
    for name in lost:
        (copy / "student" / name).unlink()
    assert run(load_recipe(tiny_recipe, [f"output={copy}"]), progress=False) == finished_run[1]
    for name in ("student.onnx", "README.md"):
        assert (copy / "student" / name).read_bytes() == (finished_run[0] / "student" / name).read_bytes()
    assert (copy / "metrics.jsonl").read_bytes() == journal


def test_export_writes_the_same_bytes_and_says_so(copy: Path, finished_run: Finished) -> None:
    (copy / "student" / "student.onnx").write_bytes(b"damaged")
    said = export(copy)
    assert f"wrote {copy / 'student' / 'student.onnx'}" in said and f"wrote {copy / 'student' / 'README.md'}" in said
    for name in ("student/student.onnx", "student/README.md", "result.json"):
        assert (copy / name).read_bytes() == (finished_run[0] / name).read_bytes()


def test_network_that_cannot_be_exported_is_no_failed_run(
    copy: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx_export, "export_onnx", refused)
    (copy / "result.json").unlink()
    result = run(load_recipe(tiny_recipe, [f"output={copy}"]), progress=False)
    assert result["onnx"] == json.loads((copy / "result.json").read_text())["onnx"] == {"reason": "no operator for it"}
    assert not (copy / "student" / "student.onnx").exists()
    assert "student.onnx is not written: no operator for it" in caplog.text
    assert "no operator for it" in (copy / "report.html").read_text()
    assert "no operator for it" in (copy / "student" / "README.md").read_text()
    with pytest.raises(UserError, match=r"^student\.architecture: no ONNX file is written: no operator for it"):
        export(copy)
    # The reason is an answer, too: the run is finished.
    assert module.complete(copy, result)


def test_export_waits_for_nobody_and_writes_beside_nobody(copy: Path, tiny_recipe: Path) -> None:
    before = (copy / "student" / "student.onnx").stat().st_mtime_ns
    with claim(load_recipe(tiny_recipe, [f"output={copy}"])), pytest.raises(UserError, match=r": in use by another"):
        export(copy)
    assert (copy / "student" / "student.onnx").stat().st_mtime_ns == before


def test_export_of_what_is_no_finished_run(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder of a run"):
        export(tmp_path)
    result = json.loads((copy / "result.json").read_text())
    for content, words in (("{", "damaged"), (json.dumps({**result, "student_sha256": "0"}), "of another student")):
        (copy / "result.json").write_text(content)
        with pytest.raises(UserError, match=rf"result\.json: {words}"):
            export(copy)
    (copy / "result.json").unlink()
    with pytest.raises(UserError, match="the run is not finished"):
        export(copy)
