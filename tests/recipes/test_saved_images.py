"""Whole runs with another size and format of the saved images, and with the teacher's answers kept beside them."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.distill import distill
from diffdfkd.recipes.run import run

CHOICES = ["synthesis.size=48", "synthesis.format=webp", "synthesis.quality=80", "distillation.augmentation=[]"]
CHOICES += ["distillation.steps=20", "distillation.checkpoint_every=5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    run(load_recipe(tiny_recipe, [f"output={folder}", *CHOICES]), progress=False)
    return folder


def test_a_run_with_lossy_webp_of_another_size(finished: Path) -> None:
    shards = sorted(finished.glob("synthetic/round-00*/shard-*.tar"))
    for shard in shards:
        choices = json.loads(shard.with_suffix(".json").read_text())["choices"]
        assert [choices[f"synthesis.{field}"] for field in ("size", "format", "quality")] == [48, "webp", 80]
        with tarfile.open(shard) as tar:
            members = [member for member in tar if not member.name.endswith(".json")]
            for member in members:
                image = Image.open(tar.extractfile(member))  # type: ignore[arg-type]
                assert (image.size, image.format, Path(member.name).suffix) == ((48, 48), "WEBP", ".webp")
            # A chunk `VP8 ` is lossy, `VP8L` lossless.
            assert tar.extractfile(members[0]).read()[12:16] == b"VP8 "  # type: ignore[union-attr]
    assert len(shards) == 8 and json.loads((finished / "result.json").read_text())["images"] == 32


def test_answers_lie_beside_the_shards_and_are_none_of_them(finished: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    kept = sorted(finished.glob("synthetic/round-*/*.logits.safetensors"))
    assert [file.name.replace(".logits.safetensors", ".tar") for file in kept] == [
        file.name for file in sorted(finished.glob("synthetic/round-*/shard-*.tar"))
    ]
    events = read_journal(finished / "metrics.jsonl")
    # The second round asks the teacher about its own images alone.
    assert [(e["files"], e["made"]) for e in events if e["event"] == "teacher_logits"] == [(4, 4), (8, 4)]
    assert {e["teacher_logits"] for e in events if e["event"] == "distill_start"} == {"cached"}
    # The folder of shards is a data set to strangers' eyes too, and nothing is written into it.
    source = shutil.copytree(finished / "synthetic", tmp_path / "synthetic")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    other = [f"output={tmp_path / 'other'}", *CHOICES, "rounds=1", "guidance.adversarial_weight=0"]
    distill(load_recipe(tiny_recipe, [*other, "distillation.steps=8"]), source, progress=False)
    assert (tmp_path / "other" / "student" / "logits" / "part-00000.safetensors").is_file()
    assert before == {path: path.stat().st_mtime_ns for path in source.rglob("*")}


@pytest.mark.parametrize("lost", ["student", "answers and a shard"])
def test_whatever_is_lost_the_same_bytes_come_back(
    finished: Path, tiny_recipe: Path, tmp_path: Path, made: Callable[[Path], dict[str, bytes]], lost: str
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "student")
    (copy / "result.json").unlink()
    kept = sorted(copy.glob("synthetic/round-*/*.logits.safetensors"))
    content = [file.read_bytes() for file in kept]
    if lost != "student":
        for file in kept[::2]:
            file.unlink()
        kept[1].write_bytes(content[2])
        (copy / "synthetic" / "round-001" / "shard-00002.tar").unlink()
    run(load_recipe(tiny_recipe, [f"output={copy}", *CHOICES]), progress=False)
    assert made(copy) == made(finished)
    assert [file.read_bytes() for file in kept] == content
    reasons = [e["reason"] for e in read_journal(copy / "metrics.jsonl") if e["event"] == "remake_logits"]
    assert reasons == (["it belongs to other images"] if lost != "student" else [])
