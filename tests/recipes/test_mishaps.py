"""What befalls a run through no fault of its recipe: damaged files, full disks, memory that ends, errors of our own."""

import errno
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input_cases import Call, command, content, copy_run
from bad_prior_cases import cut, lost
from bad_run_cases import cut_picture, cut_sidecar, without
from PIL import Image

from diffdfkd.engine import denoiser
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import bound_memory, fitting, machine_memory, ran_out, refuse_more

Recipe = dict[str, Any]
Made = Callable[[Path], dict[str, bytes]]
SHARD = "synthetic/round-000/shard-00001"


def synthetic(made: dict[str, bytes]) -> dict[str, bytes]:
    """The images, their sidecars and the manifest."""
    return {name: content for name, content in made.items() if name.startswith("synthetic/")}


def torn_line(folder: Path) -> None:
    """The manifest's last line ends in the middle."""
    manifest = folder / "synthetic" / "manifest.jsonl"
    os.truncate(manifest, manifest.stat().st_size - 20)


def lost_line(folder: Path) -> None:
    """The manifest's last line is gone without a trace."""
    manifest = folder / "synthetic" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])


def flipped_bit(folder: Path) -> None:
    shard = folder / f"{SHARD}.tar"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])


DAMAGES = {
    "shard cut": (cut(f"{SHARD}.tar"), f"{SHARD}.tar"),
    "shard of other bytes": (flipped_bit, f"{SHARD}.tar"),
    "sidecar cut": (cut(f"{SHARD}.json"), f"{SHARD}.json"),
    "sidecar lost": (lambda folder: (folder / f"{SHARD}.json").unlink(), f"{SHARD}.json"),
    "manifest torn": (torn_line, "synthetic/manifest.jsonl"),
    "manifest short": (lost_line, "synthetic/manifest.jsonl"),
}


@pytest.mark.parametrize(
    ("damage", "name"),
    # A run that goes on has such a manifest as is short of a line.
    [(damage, name) for damage in DAMAGES for name in ("run", "synthesize")][:-1],
)
def test_damage_is_found_named_and_mended(
    damage: str,
    name: str,
    good_recipe: Recipe,
    good_run: Path,
    made: Made,
    tmp_path: Path,
    command_line: Call,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copy_run(good_run, tmp_path / "run")
    do, named = DAMAGES[damage]
    do(folder)
    code, _, err = command_line(command(tmp_path, good_recipe, name=name))
    assert code == 0, err
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("diffdfkd")]
    (warning,) = [text for text in warnings if "again" in text]
    assert Path(named).name in warning and str(folder / "synthetic") in warning
    assert made(folder) == made(good_run)


@pytest.mark.parametrize(
    "damage",
    [
        without("result.json", "onnx"),
        without("result.json", "per_class", "half"),
        cut("result.json"),
        cut_picture,
        lost("preview/unguided-00000.png"),
        without("preview/preview.json", "size"),
        lost("preview/preview.json"),
        cut_sidecar,
        cut(f"{SHARD}.tar"),
    ],
)
def test_what_report_refuses_the_command_of_the_run_mends(
    damage: Callable[[Path], object],
    good_recipe: Recipe,
    good_run: Path,
    made: Made,
    tmp_path: Path,
    command_line: Call,
) -> None:
    folder = copy_run(good_run, tmp_path / "run")
    damage(folder)
    code, _, err = command_line(command(tmp_path, good_recipe))
    assert code == 0, err
    for name in ("report", "export"):
        assert command_line([name, str(folder)])[0] == 0
    assert made(folder) == made(good_run)
    before, after = ({path.name: path.read_bytes() for path in run.glob("preview/*")} for run in (good_run, folder))
    assert after == before


def test_images_per_class_may_grow(good_recipe: Recipe, good_run: Path, tmp_path: Path, command_line: Call) -> None:
    folder = copy_run(good_run, tmp_path / "run")
    before = content(folder)
    code, out, err = command_line(command(tmp_path, good_recipe, "synthesis.images_per_class=3"))
    assert code == 0 and "images    12" in out, err
    shards = {name for name in before if name.endswith(".tar")}
    assert len(shards) == 2
    assert {name: content(folder)[name] for name in shards} == {name: before[name] for name in shards}
    assert content(folder)["superseded/001/student/student.safetensors"] == before["student/student.safetensors"]


@pytest.mark.parametrize("part", ["teacher", "prior"])
def test_licence_that_is_stated_later_reaches_result_and_card(
    part: str, good_recipe: Recipe, good_run: Path, tmp_path: Path, command_line: Call
) -> None:
    folder = copy_run(good_run, tmp_path / "run")
    for _ in range(2):
        assert command_line(command(tmp_path, good_recipe, f"{part}.licence=openrail++"))[0] == 0
        assert json.loads((folder / "result.json").read_text())["licences"][part] == "openrail++"
        for name in ("report.html", "student/README.md", "recipe.yaml"):
            assert "openrail++" in (folder / name).read_text(), name
    # The second command found nothing left to do.
    assert (folder / "metrics.jsonl").read_text().count('"event": "session"') == 2


def test_licence_of_the_prior_goes_with_its_images(
    good_recipe: Recipe, good_run: Path, tmp_path: Path, command_line: Call
) -> None:
    images = tmp_path / "images"
    shutil.copytree(good_run / "synthetic", images)
    for file in images.glob("round-*/shard-*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "licence": "openrail++"}))
    arguments = [*command(tmp_path, good_recipe, "teacher.licence=mit", name="distill"), "--images", str(images)]
    code, _, err = command_line(arguments)
    assert code == 0, err
    folder = tmp_path / "run"
    for _ in range(2):
        assert json.loads((folder / "result.json").read_text())["licences"]["images"] == "openrail++"
        assert (folder / "student" / "README.md").read_text().startswith("---\nlicense: openrail++\n")
        # With the images taken away, the run still knows what they stated.
        shutil.rmtree(images, ignore_errors=True)
        assert command_line(["export", str(folder)])[0] == 0


# Memory


def cpu() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is "
        "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF."
    )


def python() -> None:
    raise MemoryError


@pytest.mark.parametrize("exhaust", [cpu, gpu, python], ids=lambda function: function.__name__)
def test_batch_that_does_not_fit_is_one_line_and_costs_no_finished_shard(
    exhaust: Callable[[], None],
    good_recipe: Recipe,
    good_run: Path,
    made: Made,
    tmp_path: Path,
    command_line: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build, shards = denoiser.unet_stage, tmp_path / "run" / "synthetic" / "round-000"
    steps = good_recipe["synthesis"]["steps"]

    def small(*arguments: Any) -> Callable[..., torch.Tensor]:
        """A UNet that finds no memory once there is a shard."""
        unet, calls = build(*arguments), 0

        def stage(*inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += shards.exists()
            if calls > steps:
                # A thread writes the first shard meanwhile.
                end = time.monotonic() + 20
                while not (shards / "shard-00000.json").exists() and time.monotonic() < end:
                    time.sleep(0.01)
                exhaust()
            return unet(*inputs, **named)

        return stage

    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "unet_stage", small)
        code, out, err = command_line(command(tmp_path, good_recipe, name="synthesize"))
    last = err.rstrip().splitlines()[-1]  # a progress bar comes first
    assert (code, out) == (2, ""), err
    assert last.startswith("error: synthesis.batch_size: a batch of 4 images on the cpu does not fit into memory (")
    assert "give a smaller one" in last and "If reserved" not in last and "enforce fail" not in last
    assert sorted(path.name for path in shards.iterdir()) == ["shard-00000.json", "shard-00000.tar"]
    finished = (shards / "shard-00000.tar").stat().st_mtime_ns
    assert command_line(command(tmp_path, good_recipe, name="synthesize"))[0] == 0
    assert (shards / "shard-00000.tar").stat().st_mtime_ns == finished
    assert synthetic(made(tmp_path / "run")) == synthetic(made(good_run))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("diffdfkd.engine.distillation.augment", "distillation.batch_size: a batch of 8 images on the cpu"),
        ("diffdfkd.engine.evaluation._predict", "evaluation.batch_size: a batch of 32 images"),
    ],
)
def test_memory_that_ends_later_names_the_batch_of_that_part(
    place: str,
    line: str,
    good_recipe: Recipe,
    good_run: Path,
    tmp_path: Path,
    command_line: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy_run(good_run, tmp_path / "run")
    for name in ("result.json", "student/student.safetensors", "student/round-000.safetensors"):
        (folder / name).unlink()
    monkeypatch.setattr("diffdfkd.engine.checkpoint.published", lambda *_: None)
    monkeypatch.setattr("diffdfkd.engine.distillation.published", lambda *_: None)
    monkeypatch.setattr(place, lambda *_, **__: cpu())
    code, _, err = command_line(command(tmp_path, good_recipe))
    assert code == 2
    assert err.rstrip().splitlines()[-1].startswith(f"error: {line} does not fit into memory (")
    assert (folder / "synthetic" / "manifest.jsonl").read_bytes() == (
        good_run / "synthetic" / "manifest.jsonl"
    ).read_bytes()


def test_errors_of_memory_are_told_from_others() -> None:
    assert ran_out(RuntimeError("std::bad_alloc")) and ran_out(MemoryError())
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(OSError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"), fitting("a", "b", "c"):
        raise RuntimeError("shapes")


def test_what_is_beyond_all_memory_is_refused_and_what_is_not_known_is_not() -> None:
    refuse_more("a", "b", 2**30, 2**30, "c")
    refuse_more("a", "b", 2**60, None, "c")
    with pytest.raises(UserError, match=r"^a: b needs 2 GiB of memory at the very least, and there are 1 GiB; c$"):
        refuse_more("a", "b", 2**31, 2**30, "c")


def test_process_is_bounded_by_the_machine() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    bound_memory()
    after, there = resource.getrlimit(resource.RLIMIT_DATA), machine_memory()
    assert there is not None and 2**28 < there < 2**50
    assert after[1] == before[1]
    assert after[0] == (there if before[0] == resource.RLIM_INFINITY else min(before[0], there))


# The disk


@pytest.mark.parametrize(("when", "name"), [(0, "synthesize"), (30, "synthesize"), (42, "run")])
def test_full_disk_is_one_line_and_the_same_command_goes_on(
    when: int,
    name: str,
    good_recipe: Recipe,
    good_run: Path,
    made: Made,
    tmp_path: Path,
    command_line: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flush, calls = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) >= when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, out, err = command_line(command(tmp_path, good_recipe, name=name))
    last = err.rstrip().splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith(f"error: output: {tmp_path / 'run'}")
    assert "cannot be written (No space left on device); make room" in last
    assert not list(tmp_path.rglob("*.tmp"))
    assert command_line(command(tmp_path, good_recipe, name=name))[0] == 0
    assert synthetic(made(tmp_path / "run")) == synthetic(made(good_run))


def test_checkpoint_that_the_disk_does_not_take(
    good_recipe: Recipe,
    good_run: Path,
    made: Made,
    tmp_path: Path,
    command_line: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No file may grow beyond 4 KiB while DeepSpeed writes, as on a disk that is full."""
    import resource

    from deepspeed import DeepSpeedEngine

    write, limits = DeepSpeedEngine.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments: Any, **named: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return write(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "save_checkpoint", full)
        code, out, err = command_line(command(tmp_path, good_recipe))
    last = err.rstrip().splitlines()[-1]
    assert (code, out) == (2, ""), err
    assert last.startswith(f"error: output: {tmp_path}/run/student/checkpoints/step-00000004-")
    assert "cannot be written (not written whole, as on a full disk); make room" in last
    assert not (tmp_path / "run" / "student" / "checkpoints" / "latest").exists()
    assert command_line(command(tmp_path, good_recipe))[0] == 0
    assert made(tmp_path / "run") == made(good_run)


def test_report_on_a_full_disk(
    good_run: Path, tmp_path: Path, command_line: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_run(good_run, tmp_path / "run")
    before = content(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = command_line(["report", str(folder)])
    assert (code, out) == (2, "")
    assert err == f"error: {folder}/report.html: No space left on device; make room on its disk\n"
    assert content(folder) == before


# Errors of our own


def test_unexpected_error_is_one_line_and_exit_code_1(
    good_recipe: Recipe, tmp_path: Path, command_line: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nnought")

    monkeypatch.setattr("diffdfkd.recipes.run.run", broken)
    arguments = command(tmp_path, good_recipe)
    assert command_line(arguments) == (
        1,
        "",
        "error: unexpected ZeroDivisionError: by nought; run again with --debug for the traceback\n",
    )
    from diffdfkd.recipes import cli

    with pytest.raises(ZeroDivisionError):
        cli.main([*arguments, "--debug"])


# The rule for channels


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_are_converted_between_prior_and_teacher(
    channels: int,
    good_recipe: Recipe,
    tiny_prior: Path,
    tiny_prior_v: Path,
    tmp_path: Path,
    command_line: Call,
) -> None:
    """A colour prior for a grey teacher, and a grey prior for a colour teacher, whose file is grey, too."""
    from diffdfkd.engine.architectures import ARCHITECTURES
    from diffdfkd.engine.classifier import Classifier, Preprocessing
    from diffdfkd.engine.weights import save_classifier

    teacher = good_recipe["teacher"] | {"channels": channels, "weights": str(tmp_path / "t.safetensors")}
    network = ARCHITECTURES["small_cnn"](channels=channels, classes=4, width=4)
    preprocessing = Preprocessing(channels, 28, (0.3,), (0.35,), "bilinear")
    save_classifier(Classifier(network, preprocessing, teacher["classes"]), tmp_path / "t.safetensors", {})
    prior = {1: tiny_prior_v, 3: tiny_prior}[channels]
    recipe = good_recipe | {"teacher": teacher, "prior": str(prior)}
    code, _, err = command_line(command(tmp_path, recipe, name="synthesize"))
    assert code == 0, err
    with tarfile.open(tmp_path / "run" / "synthetic" / "round-000" / "shard-00000.tar") as tar:
        member = tar.extractfile(tar.getnames()[0])
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).mode == "L"
    sidecar = json.loads((tmp_path / "run" / "synthetic" / "round-000" / "shard-00000.json").read_text())
    assert (sidecar["images"], sidecar["dropped"]) == (4, 0)
