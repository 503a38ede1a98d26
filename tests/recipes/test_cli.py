"""The command line: help that teaches, one line and exit code 2 for a mistake, and the commands' own output."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes import cli, run_folder
from diffdfkd.recipes.distill import foreign_images

Finished = tuple[Path, dict[str, Any]]
COMMANDS = ("run", "synthesize", "distill", "evaluate", "report")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(leaving.value.code, int)
        captured = capsys.readouterr()
        return leaving.value.code, captured.out, captured.err

    return run


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line on standard error that begins with ``error: `` and the first of the words."""
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith(f"error: {words[0]}")
    for word in words:
        assert word in err


def test_help_names_every_command_and_an_example(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert "diffdfkd run fashion output=runs/a seed=1" in out
    for command in COMMANDS:
        assert f"\n  {command} " in out
    assert call() == (0, out, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(call: Call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"\n    diffdfkd {command} " in out


def test_help_of_run_says_what_is_written(call: Call, finished_run: Finished) -> None:
    _, out, _ = call("run", "--help")
    for name in ("result.json", "report.html", "recipe.yaml", "metrics.jsonl", "student/student.safetensors"):
        assert name in out
        assert (finished_run[0] / name).is_file()


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "import sys; from diffdfkd.recipes import cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_version(call: Call) -> None:
    code, out, _ = call("--version")
    assert code == 0 and out.startswith("diffdfkd 0.")


@pytest.mark.parametrize("given", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]], ids=" ".join)
def test_rank_that_a_launcher_puts_in_is_taken_out(
    call: Call, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    refused(call(*given, "run", "fashon"), "No such option", "rank")
    monkeypatch.setenv("RANK", "1")
    refused(call(*given, "run", "fashon"), "fashon: no recipe of this name")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], ["Missing argument 'RECIPE'"]),
        (["frobnicate"], ["No such command 'frobnicate'"]),
        (["run", "fashion", "--steps", "3"], ["No such option", "--steps"]),
        (["run", "fashon"], ["fashon: no recipe of this name", "fashion"]),
        (["run", "missing.yaml"], ["missing.yaml: no such recipe file"]),
        (["run", "fashion", "seed"], ["seed: an override is key=value"]),
        (["run", "fashion", "synthesis.stepz=3"], ["synthesis.stepz: unknown field", "did you mean steps"]),
        (["run", "fashion", "synthesis.steps=0"], ["synthesis.steps: got 0"]),
        (["run", "fashion", "guidance.mode=soft"], ["guidance.mode: got", "soft", "'clean'"]),
        (["run", "fashion", "guidance.window=[1,0]"], ["guidance.window: got [1, 0]"]),
        (["synthesize", "fashion", "guidance.rho=.nan"], ["guidance.rho: ", "finite"]),
        (["synthesize", "fashion", "cutmix.every=99"], ["cutmix.every: got 99"]),
        (["distill", "fashion", "distillation.steps=-1"], ["distillation.steps: got -1"]),
        (["distill", "fashion", "rounds=0"], ["rounds: got 0"]),
        (["evaluate", "fashion"], ["Missing option '--student'"]),
        (["evaluate", "fashion", "--student", "x", "teacher.channels=2"], ["teacher.channels: got 2"]),
        (["report"], ["Missing argument 'DIR'"]),
        (["report", "/nowhere"], ["/nowhere: not a folder of a run"]),
    ],
    ids=" ".join,
)
def test_mistake_before_anything_is_loaded(call: Call, arguments: list[str], words: list[str]) -> None:
    refused(call(*arguments), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prior=/nowhere", ["prior.path: /nowhere: no such folder"]),
        ("prior=someone/some-model", ["prior.revision: ", "someone/some-model", "commit"]),
        ("teacher.weights=null", ["teacher.weights: missing"]),
        ("teacher.weights=/nowhere", ["teacher.weights: /nowhere: no such file"]),
        ("teacher.options.width=5", ["teacher.weights: ", "does not fit"]),
        ("teacher.classes=[a,b,c,d,e]", ["teacher.weights: ", "4 classes", "has 5"]),
        ("teacher.architecture=small_cmm", ["teacher.architecture: no architecture small_cmm", "small_cnn"]),
        ("teacher.channels=3", ["teacher.weights: "]),
        ("student.architecture=nowhere.at_all:make", ["student.architecture: cannot import nowhere.at_all"]),
        ("student.options.depth=3", ["student.options.depth: unknown option", "width"]),
        ("student.weights=/nowhere", ["student.weights: /nowhere: no such file"]),
        ("evaluation.images=/nowhere", ["evaluation.images: /nowhere: no such file or folder"]),
        ("evaluation.labels=/nowhere", ["evaluation.labels: /nowhere"]),
        ("output=/dev/null/run", ["output: /dev/null/run cannot be written"]),
    ],
)
def test_mistake_about_files(call: Call, tiny_recipe: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    output = tmp_path / "run"
    refused(call("run", tiny_recipe, f"output={output}", override), *words)
    assert not (output / "recipe.yaml").exists()


def test_test_images_without_labels_are_refused_at_once(
    call: Call, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "flat" / "a.png")
    monkeypatch.setattr("diffdfkd.engine.prior.load_prior", lambda *_: pytest.fail("the prior was loaded before"))
    outcome = call("run", tiny_recipe, f"output={tmp_path / 'run'}", f"evaluation.images={tmp_path / 'flat'}")
    refused(outcome, "evaluation.images: ", "flat: image 0 has no label", "one sub-folder a class")


def test_mistake_about_images_names_the_option(call: Call, tiny_recipe: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'run'}"
    refused(call("distill", tiny_recipe, output, "--images", "/nowhere"), "--images: /nowhere: no such file or folder")
    student = ("evaluate", tiny_recipe, "--student", tmp_path)
    refused(call(*student, "--images", "/nowhere"), "--images: /nowhere: no such file or folder")
    (tmp_path / "real").mkdir()
    outcome = call(*student, "--images", tmp_path / "real", "--labels", tmp_path / "labels")
    refused(outcome, f"--labels: {tmp_path / 'labels'}: no such file; for a folder of images", "null")


def test_labels_of_strangers_are_left_aside_by_distill(tiny_recipe: Path, tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (20, 20), 7).save(image, "PNG")
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for ending, content in (("png", image.getvalue()), ("json", b'{"class": "no class of ours"}')):
                member = tarfile.TarInfo(f"1.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    images, digest = foreign_images(load_recipe(tiny_recipe), tmp_path)
    assert images.read([0, 1])[0].shape == (2, 1, 28, 28)
    (tmp_path / "b.tar").unlink()
    assert foreign_images(load_recipe(tiny_recipe), tmp_path)[1] != digest


@pytest.mark.parametrize("command", ["run", "synthesize"])
def test_synthesis_of_several_processes_is_refused(
    call: Call, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        call(command, tiny_recipe, f"output={tmp_path / 'run'}"), f"{command}: synthesis is one process", "torchrun"
    )
    assert not (tmp_path / "run").exists()


def test_gpu_that_is_not_there(call: Call, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(call("run", tiny_recipe, f"output={tmp_path}", "device=cuda"), "device: cuda", "device=cpu")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.safetensors", None, ["--student: ", "no such file"]),
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", ["--student: ", "truncated"]),
        ("text.pt", b"not a pickle", ["--student: ", "nor a plain torch state dict"]),
    ],
)
def test_student_file_that_is_none(
    call: Call, tiny_recipe: Path, tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(call("evaluate", tiny_recipe, "--student", tmp_path / name), *words)


def test_student_that_is_a_folder(call: Call, tiny_recipe: Path, finished_run: Finished, tmp_path: Path) -> None:
    folder = finished_run[0]
    refused(
        call("evaluate", tiny_recipe, "--student", folder),
        f"--student: {folder} is a folder; its student is {folder / 'student' / 'student.safetensors'}",
    )
    refused(call("evaluate", tiny_recipe, "--student", tmp_path), f"--student: {tmp_path} is a folder; give the file")


def test_debug_shows_the_traceback() -> None:
    from diffdfkd.engine.errors import UserError

    for arguments in (["--debug", "run", "fashon"], ["run", "fashon", "--debug"]):
        with pytest.raises(UserError, match="fashon"):
            cli.main(arguments)


def test_interrupt_says_how_to_go_on(
    call: Call, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt  # not by the signal, which a command in the background may be told to ignore

    monkeypatch.setattr(run_folder, "_settle", interrupted)
    code, out, err = call("run", tiny_recipe, f"output={tmp_path / 'run'}")
    assert (code, out, err) == (130, "", "interrupted; the same command resumes\n")


def test_evaluate_writes_what_scripts_rely_on(
    call: Call, tiny_recipe: Path, finished_run: Finished, tmp_path: Path
) -> None:
    folder, result = finished_run
    figures = tmp_path / "figures.json"
    student = folder / "student" / "student.safetensors"
    code, out, _ = call("evaluate", tiny_recipe, "--student", student, "--json", figures)
    assert code == 0
    written = json.loads(figures.read_text())
    assert (written["accuracy"], written["images"]) == (result["student_accuracy"], 32)
    assert written["per_class"] == result["per_class"]
    assert f"{result['student_accuracy']:.2%} of 32 images" in out


def test_run_prints_a_summary(call: Call, tiny_recipe: Path, finished_run: Finished) -> None:
    folder, result = finished_run
    code, out, err = call("run", tiny_recipe, f"output={folder}")
    assert (code, err) == (0, "")
    for figure in (f"{result['student_accuracy']:.2%}", f"{result['teacher_accuracy']:.2%}", "32", "report.html"):
        assert figure in out


def test_report_is_written_again(call: Call, finished_run: Finished) -> None:
    page = finished_run[0] / "report.html"
    before = page.read_bytes()
    page.unlink()
    code, out, _ = call("report", finished_run[0])
    assert (code, out) == (0, f"wrote {page}\n")
    assert page.read_bytes() == before


def test_fresh_process_prints_no_noise(tiny_recipe: Path, tmp_path: Path) -> None:
    """Other packages' banners and warnings stay out of both streams; on stderr stands what is ours, in lines."""
    overrides = ["rounds=1", "guidance.adversarial_weight=0", "synthesis.images_per_class=1", "distillation.steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "diffdfkd.recipes.cli", "run", tiny_recipe, f"output={tmp_path / 'run'}", *overrides],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["student", "teacher", "images", "time", "report"]
    assert "\r" not in done.stderr
    begun = ("synthesis, round 1 of 1: ", "distillation: ", "evaluation: ")
    lines = done.stderr.splitlines()
    assert all(any(line.startswith(stage) for line in lines) for stage in begun)
    # And that a teacher with random weights is as good as its guess.
    (doubt,) = (line for line in lines if not line.startswith(begun))
    assert doubt.startswith("evaluation.images: the teacher is right on ")
