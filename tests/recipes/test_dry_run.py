"""``diffdfkd run --dry-run``: its counts are those of a run, what is missing is named, and nothing is made."""

import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes import cli
from diffdfkd.recipes.dry_run import dry_run
from diffdfkd.recipes.run import load_classifiers
from diffdfkd.recipes.run_folder import hold

Finished = tuple[Path, dict[str, Any]]
Plan = Callable[..., tuple[str, bool]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def plan(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Dry run of the tiny recipe with overrides, as one line; fails where it opens a connection or makes a file."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*arguments: object) -> None:
        raise AssertionError("a dry run went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    def run(*overrides: str) -> tuple[str, bool]:
        text, complete = dry_run(load_recipe(tiny_recipe, overrides))
        assert list(work.iterdir()) == []
        long = [line for line in text.splitlines() if len(line) > 100]
        assert all(re.search(r"hf download|/\S{60}", line) for line in long)
        return " ".join(text.split()), complete

    return run


@pytest.fixture
def hub_copy(tiny_prior: Path, tmp_path: Path) -> Path:
    """The tiny prior in the hub library's cache, as some/prior at COMMIT."""
    return Path(shutil.copytree(tiny_prior, tmp_path / "hub" / "models--some--prior" / "snapshots" / COMMIT))


def test_of_a_complete_recipe_everything_is_found(plan: Plan) -> None:
    text, complete = plan("about.time=a minute", "output=runs/new")
    assert complete and "MISSING" not in text
    assert "time a minute" in text and "runs/new, to be made" in text
    assert "ddim makes 3 steps of its schedule" in text and "8 BatchNorm layers" in text
    assert "32 labelled images" in text
    assert "32 of 4 classes, 8 each, in 2 rounds, 8 shards, 8 batches of at most 4" in text
    assert "100 steps of 8, 25.0 times through all images" in text
    assert text.endswith("ready nothing is missing; the same command without --dry-run starts the run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("synthesis.prompt=a photo of a {}", 'prompts "a photo of a red" for a, and 3 others UNet'),
        ("synthesis.prompt=a photo.", 'prompts "a photo." for all 4 classes, which guidance alone'),
        (
            'synthesis.prompt=["a {}", "one {}"]',
            'prompts "a red" or 1 other, drawn for each sample, for a, and 6 others',
        ),
        (
            'synthesis.prompt=["a photo.", "art"]',
            '"a photo." or 1 other, drawn for each sample, for all 4 classes, which',
        ),
    ],
)
def test_a_prompt_is_shown_as_the_prior_reads_it(plan: Plan, override: str, words: str) -> None:
    assert words in plan(override, "teacher.classes=[a,b,c,d]", "synthesis.words=[red,green,blue,grey]")[0]


def test_a_disk_that_may_be_too_small_is_said_twice(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 1000, 1, 1, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    text, complete = plan()
    assert complete and "4.1 kB free, which may be TOO LITTLE" in text
    assert "ready nothing is missing, but the disk may be too small; " in text


def test_selection_and_unguided_images_are_planned_where_there_are_any(plan: Plan) -> None:
    text, _ = plan("selection.balance=0.5", "synthesis.images_per_class=60")
    assert "selection of these images by balance 0.5" in text and "comparison 24 unguided images more" in text
    text, _ = plan()
    assert "selection" not in text and "comparison" not in text


@pytest.mark.parametrize("mode", ["none", "clean", "reuse", "exact"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_unet_is_called_as_often_as_planned(plan: Plan, tiny_recipe: Path, mode: str, scale: float) -> None:
    overrides = (f"guidance.mode={mode}", f"synthesis.guidance_scale={scale}", "guidance.window=[0,0.5]")
    recipe = load_recipe(tiny_recipe, overrides)
    prior = load_prior(recipe.prior, "cpu")
    evaluated = 0

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal evaluated
        evaluated += len(inputs[0] if inputs else keywords["sample"])

    prior.unet.register_forward_pre_hook(count, with_kwargs=True)
    teacher, _, _ = load_classifiers(recipe)
    with Painter(recipe, Models(prior, teacher), round=0) as painter:
        painter.paint(torch.arange(4), torch.arange(4))
    text, _ = plan(*overrides)
    planned = re.search(r"(\d+) calls an image, (\d+) in all", text)
    assert planned is not None
    assert int(planned[1]) * 4 == evaluated and int(planned[2]) == int(planned[1]) * 32
    backward = {"reuse": 2, "exact": 2}.get(mode, 0) * (2 if scale == 3 else 1)
    assert ("backward" in text) == (backward > 0)
    assert backward == 0 or f"; {backward} of an image's calls with a backward pass" in text


@pytest.mark.parametrize("mode", ["none", "clean", "exact"])
@pytest.mark.parametrize("repair", ["steps", "masked"])
def test_calls_of_a_fan_out_are_counted_too(plan: Plan, tiny_recipe: Path, mode: str, repair: str) -> None:
    overrides = (f"guidance.mode={mode}", "synthesis.fan_out=2", "synthesis.fork=0.5", f"cutmix.repair={repair}")
    overrides += ("cutmix.probability=1", "cutmix.passes=2", "cutmix.every=1")
    recipe = load_recipe(tiny_recipe, overrides)
    prior = load_prior(recipe.prior, "cpu")
    rows: list[int] = []
    prior.unet.register_forward_pre_hook(
        lambda module, inputs, keywords: rows.append(len(inputs[0] if inputs else keywords["sample"])), with_kwargs=True
    )
    teacher, _, _ = load_classifiers(recipe)
    with Painter(recipe, Models(prior, teacher), round=0) as painter:
        painting = painter.paint(torch.arange(8), torch.arange(4).repeat(2))
    assert len(painting.images) == len(painting.targets) == 8
    text, _ = plan(*overrides)
    planned = re.search(r"(\d+) calls for 2 images, (\d+) in all", text)
    assert planned is not None and set(rows) == {8}
    assert int(planned[1]) * 4 == sum(rows) and int(planned[2]) == int(planned[1]) * 16
    assert "4 shards, 4 batches of at most 4 trajectories, 2 images each" in text
    assert ("to mend seams" in text) == (repair == "masked")


def test_a_run_takes_no_more_disk_than_planned(plan: Plan, finished_run: Finished) -> None:
    text, _ = plan()
    planned = re.search(r"at most about ([\d.]+) kB of images in 8 .tar and 8 .json, ([\d.]+) kB of students", text)
    assert planned is not None
    folder, _ = finished_run
    for part, limit in (("synthetic", planned[1]), ("student", planned[2])):
        used = sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file())
        assert 0.1 * float(limit) * 1000 < used <= float(limit) * 1000


@pytest.mark.parametrize(
    ("override", "name", "words"),
    [
        ("prior.path=priors/none/such", "prior", "priors/none/such: no such folder"),
        ("prior.path=some/prior", "prior", "some/prior is no folder here, and as a hub id it needs prior.revision"),
        ("teacher.weights=no.pth", "teacher.weights", "no.pth: no such file; Dropbox"),
        ("student.weights=no.pth", "student.weights", "no.pth: no such file"),
        ("evaluation.images=data/none", "evaluation.images", "data/none: no such file or folder; kriz"),
        ("prior.loras=[{path: lora.safetensors}]", "prior.loras.0", "lora.safetensors: no such folder or file"),
    ],
)
def test_what_is_missing_is_named_with_its_source(plan: Plan, override: str, name: str, words: str) -> None:
    text, complete = plan(override, "about.teacher=Dropbox", "about.images=kriz")
    assert not complete
    assert f"{name} MISSING: {words}" in text
    assert text.endswith(f"MISSING {name}; nothing was made or fetched")


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_damaged_file_of_the_prior_is_named(
    plan: Plan, tiny_prior: Path, tmp_path: Path, name: str, content: str
) -> None:
    copy = Path(shutil.copytree(tiny_prior, tmp_path / "damaged"))
    (copy / name).write_text(content)
    text, complete = plan(f"prior.path={copy}")
    file = copy / name if name != "tokenizer/tokenizer_config.json" else copy / "tokenizer"
    assert not complete and re.search(rf"prior MISSING: {file}: .* again teacher ", text)


def test_a_file_or_folder_in_the_wrong_place_is_told_from_a_missing_one(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "sd.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"sd\.safetensors: a single-file checkpoint"):
        plan(f"prior.path={tmp_path / 'sd.safetensors'}")
    with pytest.raises(UserError, match=r"teacher\.weights: .*: a folder; name the file in it"):
        plan(f"teacher.weights={tmp_path}")
    text, complete = plan("teacher.weights=null")
    assert not complete and "teacher.weights MISSING: the recipe names none" in text


def test_a_run_that_goes_on_at_this_moment_is_not_ready(
    plan: Plan, finished_run: Finished, tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished_run[0], tmp_path / "copy"))
    with hold(folder):
        text, complete = plan(f"output={folder}")
    assert not complete and f"output REFUSED: {folder}: another process works on it now" in text
    # Threads are those that the run began with, whatever the machine has.
    written = folder / "recipe.yaml"
    written.write_text(written.read_text().replace("\nthreads: 1\n", "\nthreads: 7\n"))
    text, complete = plan(f"output={folder}", "threads=null")
    assert complete and "device cpu, 7 CPU threads" in text


def test_other_files_in_the_output_folder_are_mentioned(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    assert "thesis, empty" in plan(f"output={folder}")[0]
    (folder / "thesis.tex").write_text("")
    assert "thesis, which holds files of something else: they stay" in plan(f"output={folder}")[0]


def test_of_a_hub_prior_the_command_is_given_until_its_files_are_in_the_cache(plan: Plan, hub_copy: Path) -> None:
    overrides = ("prior.path=some/prior", f"prior.revision={COMMIT}")
    text, complete = plan(*overrides)
    assert complete and f"some/prior at {COMMIT}, in the cache" in text
    (hub_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    text, complete = plan(*overrides)
    assert not complete and "diffusion_pytorch_model.safetensors is missing" in text
    assert f"hf download some/prior --revision {COMMIT} --include" in text
    text, complete = plan("prior.path=other/prior", f"prior.revision={COMMIT}")
    assert not complete and f"hf download other/prior --revision {COMMIT} --include" in text


def test_the_command_that_fetches_takes_every_file_that_a_prior_needs(tmp_path: Path, tiny_prior: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    from diffdfkd.engine.prior import load_prior
    from diffdfkd.engine.recipe import PriorRecipe
    from diffdfkd.recipes.inventory import _HUB_GLOBS

    files = [path.relative_to(tiny_prior).as_posix() for path in tiny_prior.rglob("*") if path.is_file()]
    unwanted = ["v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    fetched = list(filter_repo_objects([*files, *unwanted], allow_patterns=list(_HUB_GLOBS)))
    assert not set(fetched) & set(unwanted)
    for name in fetched:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny_prior / name, tmp_path / name)
    load_prior(PriorRecipe(path=str(tmp_path)), "cpu")


def test_what_is_there_and_wrong_is_refused_as_by_a_run(plan: Plan, tiny_prior: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.architecture: no architecture resnet35"):
        plan("teacher.architecture=resnet35", "teacher.weights=no.pth", "teacher.options={}")
    with pytest.raises(UserError, match=r"teacher\.weights"):
        plan("teacher.options={width: 8}")
    with pytest.raises(UserError, match=r"evaluation\.images"):
        plan(f"evaluation.images={tiny_prior}")


def test_folder_of_another_recipe_is_not_ready(plan: Plan, finished_run: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run[0], tmp_path / "copy"))
    (folder / ".lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    text, complete = plan(f"output={folder}")
    assert complete and "holds a run of this recipe, which the command continues" in text
    # Also where the digests cannot be compared, since a file is missing.
    for more in ((), ("teacher.weights=no.pth",)):
        text, complete = plan(f"output={folder}", "seed=5", *more)
        assert not complete and f"output REFUSED: seed: {folder} holds a run with seed=0, now it is 5" in text
    (folder / "recipe.yaml").write_text("a: [")
    text, complete = plan(f"output={folder}")
    assert not complete and "recipe.yaml is no longer YAML" in text
    assert set(folder.rglob("*")) == set(before)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "recipe.yaml")


def test_a_gpu_that_is_asked_for_and_not_there_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text, complete = plan("device=cuda")
    assert not complete and "device REFUSED: device: cuda is asked for" in text
    text, _ = plan("device=cuda", "student.weights=no.pth")
    assert text.endswith(
        "MISSING student.weights; nothing was made or fetched REFUSED device; nothing was made or fetched"
    )


def test_the_exit_code_tells_a_script(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, code in (([], 0), (["teacher.weights=no.pth"], 3), (["rounds=0"], 2)):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["run", str(tiny_recipe), "--dry-run", *more])
        assert leaving.value.code == code
    assert "starts the run" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
