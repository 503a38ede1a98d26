"""Whole runs on tiny networks: what they leave, that they continue, and what they refuse."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from diffdfkd.engine.accounts import accounts
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.report import write_report
from diffdfkd.engine.weights import digest
from diffdfkd.recipes.distill import distill, foreign_images
from diffdfkd.recipes.evaluate import evaluate
from diffdfkd.recipes.figures import no_better_than_a_guess
from diffdfkd.recipes.run import run
from diffdfkd.recipes.run_folder import claim
from diffdfkd.recipes.synthesize import synthesize

Finished = tuple[Path, dict[str, Any]]
Made = Callable[[Path], dict[str, bytes]]

PROMISED = {
    "student_accuracy", "teacher_accuracy", "agreement", "images", "images_per_second", "synthesis_seconds",
    "distillation_seconds", "wall_seconds", "peak_memory_mib", "memory_kind", "device", "seed", "versions",
}  # fmt: skip

KILL_AT = """
import os, signal, sys
replace = os.replace
def dying(source, target, **more):
    if str(target).endswith({target!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **more)
os.replace = dying
from diffdfkd.recipes.cli import main
main(sys.argv[1:])
"""


PEAK_MEMORY = """
import sys
from diffdfkd.recipes.cli import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    assert not leaving.code
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")][0])
"""


TUPLE_STUDENT = """
import torch
class Student(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, classes, 28)
    def forward(self, images):
        logits = self.layer(images).flatten(1)
        return (logits, logits) if self.training else logits
def factory(classes):
    return Student(classes)
"""


@pytest.fixture
def copy(finished_run: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, to be disturbed."""
    return Path(shutil.copytree(finished_run[0], tmp_path / "copy"))


def again(tiny_recipe: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return run(load_recipe(tiny_recipe, [f"output={folder}", *overrides]), progress=False)


def test_result_holds_what_scripts_rely_on(finished_run: Finished) -> None:
    folder, result = finished_run
    assert result.keys() >= PROMISED
    assert json.loads((folder / "result.json").read_text()) == result
    assert all(0 <= result[key] <= 1 for key in ("student_accuracy", "teacher_accuracy", "agreement"))
    assert (result["images"], result["test_images"], result["seed"], result["device"]) == (32, 32, 0, "cpu")
    assert result["images_per_second"] == pytest.approx(32 / result["synthesis_seconds"])
    assert result["memory_kind"] == "rss" and 100 < result["peak_memory_mib"] < 8192
    parts = result["synthesis_seconds"] + result["distillation_seconds"]
    assert 0 < parts < result["wall_seconds"]
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]


def test_files_of_a_run(finished_run: Finished) -> None:
    folder, _ = finished_run
    assert len(list(folder.glob("synthetic/round-00[01]/shard-*.tar"))) == 8
    assert len((folder / "synthetic" / "manifest.jsonl").read_text().splitlines()) == 8
    snapshots = [
        (folder / "student" / name).read_bytes() for name in ("round-000.safetensors", "round-001.safetensors")
    ]
    assert snapshots[0] != snapshots[1] == (folder / "student" / "student.safetensors").read_bytes()
    assert "not finished" not in (folder / "report.html").read_text()
    assert not list(folder.rglob("*.tmp"))


def test_frozen_recipe_says_all_and_loads_again(finished_run: Finished, tiny_recipe: Path) -> None:
    folder, _ = finished_run
    frozen = yaml.safe_load((folder / "recipe.yaml").read_text())["frozen"]
    assert set(frozen["digests"]) == {"prior", "teacher"}
    assert frozen["versions"]["deepspeed"]
    repeated, asked = load_recipe(folder / "recipe.yaml"), load_recipe(tiny_recipe)
    assert (repeated.guidance, repeated.synthesis) == (asked.guidance, asked.synthesis)
    assert repeated.distillation == asked.distillation


def test_finished_run_is_left_alone(copy: Path, tiny_recipe: Path, finished_run: Finished, made: Made) -> None:
    journal = (copy / "metrics.jsonl").read_bytes()
    assert again(tiny_recipe, copy) == finished_run[1]
    assert made(copy) == made(finished_run[0])
    assert (copy / "metrics.jsonl").read_bytes() == journal


@pytest.mark.parametrize(
    "lost",
    [
        ["result.json", "student/student.safetensors"],
        ["student/round-001.safetensors"],
        ["student/round-000.safetensors"],
        ["student/round-001.safetensors", "student/checkpoints"],
        ["synthetic/round-001/shard-00002.tar", "synthetic/manifest.jsonl"],
    ],
    ids=lambda lost: lost[0],
)
def test_what_is_lost_is_made_again(
    copy: Path, tiny_recipe: Path, finished_run: Finished, made: Made, lost: list[str]
) -> None:
    for name in [*lost, "result.json"]:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    result = again(tiny_recipe, copy)
    assert made(copy) == made(finished_run[0])
    assert result["student_sha256"] == finished_run[1]["student_sha256"]
    assert accounts(read_journal(copy / "metrics.jsonl")).sessions == 2


@pytest.mark.parametrize("harm", ["cut", "flip"])
@pytest.mark.parametrize("names", [["round-001"], ["round-000"], ["student"], ["round-001", "student"]], ids="+".join)
def test_a_damaged_student_is_never_handed_on(
    copy: Path,
    tiny_recipe: Path,
    finished_run: Finished,
    made: Made,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    harm: str,
) -> None:
    (copy / "result.json").unlink()
    for name in names:
        file = copy / "student" / f"{name}.safetensors"
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content if harm == "flip" else content[:100])
    again(tiny_recipe, copy)
    assert made(copy) == made(finished_run[0])
    student = (copy / "student" / "student.safetensors").read_bytes()
    assert student == (finished_run[0] / "student" / "student.safetensors").read_bytes()
    for name in set(names) - {"student"}:
        assert f"{name}.safetensors is made again: " in caplog.text


def test_a_run_is_a_source_of_images_too(good_run: Path, good_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Its shards are, and not its previews; it is the same source as the folder of its shards."""
    recipe = load_recipe(good_recipe, [f"output={tmp_path / 'new'}"])
    first = distill(recipe, good_run, progress=False)
    assert first is not None and first["images"] == 8
    assert distill(recipe, good_run / "synthetic", progress=False) == first


def test_lost_manifest_of_a_finished_run_is_written_again(
    copy: Path, tiny_recipe: Path, finished_run: Finished, made: Made
) -> None:
    (copy / "synthetic" / "manifest.jsonl").unlink()
    again(tiny_recipe, copy)
    assert made(copy) == made(finished_run[0])


def test_damaged_shard_is_found_in_a_finished_run(
    copy: Path, tiny_recipe: Path, finished_run: Finished, made: Made
) -> None:
    shard = copy / "synthetic" / "round-000" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    again(tiny_recipe, copy)
    assert made(copy) == made(finished_run[0])
    reasons = [row for row in read_journal(copy / "metrics.jsonl") if row["event"] == "remake"]
    assert [row["shard"] for row in reasons] == [1]


def test_killed_three_times_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, tiny_recipe: Path, finished_run: Finished, made: Made
) -> None:
    """Killed between a shard's tar and its sidecar, while a checkpoint is published, and before the evaluation."""
    command = ["run", str(tiny_recipe), f"output={tmp_path / 'killed'}"]
    for target in ("round-000/shard-00001.json", "checkpoints/latest", "student/student.safetensors"):
        killed = subprocess.run(
            [sys.executable, "-c", KILL_AT.format(target=target), *command], capture_output=True, timeout=300
        )
        assert killed.returncode == -9, killed.stderr.decode()
        assert not (tmp_path / "killed" / "result.json").exists()
    result = again(tiny_recipe, tmp_path / "killed")
    assert made(tmp_path / "killed") == made(finished_run[0])
    assert result["student_accuracy"] == finished_run[1]["student_accuracy"]
    assert accounts(read_journal(tmp_path / "killed" / "metrics.jsonl")).sessions == 4


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path: Path, tiny_recipe: Path, finished_run: Finished, made: Made) -> None:
    draw = random.Random(0)
    command = [sys.executable, "-m", "diffdfkd.recipes.cli", "run", str(tiny_recipe)]
    started = time.perf_counter()
    subprocess.run([*command, f"output={tmp_path / 'whole'}"], check=True, capture_output=True)
    whole = time.perf_counter() - started
    kills = attempts = 0
    reached: set[str] = set()
    while kills < 10:
        attempts += 1
        folder = tmp_path / f"attempt-{attempts}"
        process = subprocess.Popen([*command, f"output={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(0.2, 0.95) * whole)
            continue  # it was faster this time
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        journal = folder / "metrics.jsonl"
        reached |= {row["event"] for row in read_journal(journal)} if journal.is_file() else set()
        again(tiny_recipe, folder)
        assert made(folder) == made(finished_run[0])
        kills += 1
    # Not all of them fell into the imports.
    assert {"shard", "distill"} <= reached, reached


@pytest.mark.parametrize(
    ("teacher", "student", "images", "classes", "said"),
    [
        (0.1, 0.1, 10_000, 10, "the teacher is right on 10.0% of 10,000 images"),
        (0.0, 0.9, 50, 10, "the teacher is right on 0.0%"),  # as of two class orders that have nothing in common
        (0.4, 0.9, 20, 4, "the teacher is right on 40.0% of 20 images, which so few cannot tell from"),
        (1.0, 1.0, 3, 2, "which so few cannot tell from"),
        (0.9, 0.1, 10_000, 10, "the student is right on 10.0% of 10,000 images"),
        (None, 0.1, 10_000, 10, "the student"),
        (0.12, 0.12, 10_000, 10, None),
        (0.6, 0.6, 32, 4, None),
        (None, 0.6, 32, 4, None),
    ],
)
def test_who_guesses_is_named(
    teacher: float | None, student: float, images: int, classes: int, said: str | None
) -> None:
    evaluation: Any = SimpleNamespace(teacher_accuracy=teacher, accuracy=student, images=images)
    doubt = no_better_than_a_guess(evaluation, classes)
    if said is None:
        assert doubt is None
    else:
        assert doubt is not None and said in doubt and f"a guess among {classes} classes" in doubt


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tiny_recipe: Path, tmp_path: Path) -> None:
    """Twenty times the images: one copy of the larger set's pixels, in bytes, would be 62 MiB.

    Engines are named, since only the longer run would try others, which takes some 60 MiB whatever its length.
    """
    settings = ["rounds=1", "guidance.adversarial_weight=0", "synthesis.batch_size=40", "synthesis.steps=1"]
    settings += ["synthesis.size=128", "cutmix.every=0", "distillation.steps=20", "distillation.holdout=40"]
    settings += ["engine=eager"]
    peaks = {}
    for per_class in (50, 1000):
        folder = tmp_path / str(per_class)
        arguments = ["run", str(tiny_recipe), f"output={folder}", f"synthesis.images_per_class={per_class}", *settings]
        done = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY, *arguments], check=True, capture_output=True, text=True
        )
        rows = [row for row in read_journal(folder / "metrics.jsonl") if row["event"] == "stage"]
        # Up to the end of each stage, too: what a later one needs in any case would hide what an earlier one took.
        peaks[per_class] = {row["stage"]: row["peak_memory_mib"] for row in rows}
        peaks[per_class]["all"] = int(done.stdout.split()[-1]) / 1024
        assert json.loads((folder / "result.json").read_text())["images"] == 4 * per_class
    assert peaks[50].keys() == peaks[1000].keys() >= {"synthesis", "distillation", "diversity", "all"}
    assert all(peaks[1000][stage] < peak + 30 for stage, peak in peaks[50].items()), peaks


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("synthesis.steps=4", ["synthesis.steps: ", "synthesis.steps=3, now it is 4"]),
        ("seed=7", ["seed: ", "seed=0, now it is 7"]),
        ("distillation.learning_rate=0.5", ["distillation.learning_rate: "]),
        ("synthesis.images_per_class=9", ["synthesis.images_per_class: "]),
        ("threads=2", ["threads: ", "threads=1, now it is 2"]),
        ("student.options.width=4", ["student.options.width: "]),
    ],
)
def test_run_of_another_recipe_is_refused(
    copy: Path, tiny_recipe: Path, finished_run: Finished, made: Made, override: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        again(tiny_recipe, copy, override)
    assert str(error.value).startswith(words[0])
    for word in [*words, str(copy), "choose another output folder"]:
        assert word in str(error.value)
    assert made(copy) == made(finished_run[0])


def test_other_weights_under_the_same_path_are_refused(
    copy: Path, tiny_recipe: Path, tiny_prior: Path, tmp_path: Path
) -> None:
    prior = Path(shutil.copytree(tiny_prior, tmp_path / "prior"))
    (prior / "scheduler" / "scheduler_config.json").open("a").write(" ")
    with pytest.raises(UserError, match=r"^prior\.path: the files at .* are not those"):
        again(tiny_recipe, copy, f"prior={prior}")


def test_moved_weights_are_recognised(copy: Path, tiny_recipe: Path, tiny_prior: Path, tmp_path: Path) -> None:
    prior = Path(shutil.copytree(tiny_prior, tmp_path / "elsewhere"))
    (prior / "README.md").write_text("another card")
    again(tiny_recipe, copy, f"prior={prior}")


def test_evaluation_may_differ(copy: Path, tiny_recipe: Path, finished_run: Finished, made: Made) -> None:
    result = again(tiny_recipe, copy, "evaluation.images=null")
    assert (result["student_accuracy"], result["agreement"], result["per_class"]) == (None, None, None)
    assert made(copy) == made(finished_run[0])


def test_versions_of_the_beginning_are_kept_and_a_change_is_said(
    copy: Path, tiny_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = yaml.safe_load((copy / "recipe.yaml").read_text())
    content["frozen"]["versions"]["torch"] = "2.0.0"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(content))
    result = again(tiny_recipe, copy, "evaluation.images=null")
    assert yaml.safe_load((copy / "recipe.yaml").read_text())["frozen"]["versions"]["torch"] == "2.0.0"
    assert result["versions"]["torch"] != "2.0.0"
    assert "the run began with torch 2.0.0, now " in caplog.text


@pytest.mark.parametrize("text", ["prior: [", "seed: 1", "just words", "\x00"])
def test_broken_recipe_in_the_folder_is_one_line(copy: Path, tiny_recipe: Path, text: str) -> None:
    (copy / "recipe.yaml").write_text(text)
    for command in (lambda: again(tiny_recipe, copy), lambda: write_report(copy)):
        with pytest.raises(UserError, match=r"recipe\.yaml.* another (output )?folder") as error:
            command()
        assert "\n" not in str(error.value)


def test_recipe_of_the_folder_is_named_where_it_no_longer_holds(copy: Path, tiny_recipe: Path) -> None:
    content = yaml.safe_load((copy / "recipe.yaml").read_text())
    content["guidance"]["strength"] = 3
    (copy / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"^output: .*recipe\.yaml: guidance\.strength: unknown field"):
        again(tiny_recipe, copy)


@pytest.mark.parametrize("text", ['{"student_accuracy": 0.5, "stu', "", "[]", "{}", "\xff"])
def test_broken_result_is_written_again(copy: Path, tiny_recipe: Path, finished_run: Finished, text: str) -> None:
    (copy / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"result\.json: damaged; give the command of the run again"):
        write_report(copy)
    result = again(tiny_recipe, copy)
    assert result["student_sha256"] == finished_run[1]["student_sha256"]
    assert json.loads((copy / "result.json").read_text()) == result


def test_broken_preview_is_made_again(copy: Path, tiny_recipe: Path, finished_run: Finished) -> None:
    file = copy / "preview" / "preview.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"preview\.json: damaged"):
        write_report(copy)
    again(tiny_recipe, copy)
    assert file.read_bytes() == (finished_run[0] / "preview" / "preview.json").read_bytes()


def test_mistake_does_not_bind_the_folder(tiny_recipe: Path, tmp_path: Path) -> None:
    for override in (f"prior={tmp_path / 'nowhere'}", "student.architecture=small_cmm", "evaluation.images=/nowhere"):
        with pytest.raises(UserError):
            again(tiny_recipe, tmp_path / "run", override)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_folder_in_use_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe, [f"output={tmp_path / 'run'}"])
    with claim(recipe), pytest.raises(UserError, match=r"^output: .* is in use by another"), claim(recipe):
        pass
    with claim(recipe):
        pass


def test_unwritable_output_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: .*cannot be written"):
        again(tiny_recipe, tmp_path / "file" / "run")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> tuple[Path, dict[str, bytes], dict[str, Any]]:
    """A run of one round made piece by piece: images, student, then more images and another student.

    The folder, the bytes of the first shards, and the result.
    """
    folder = tmp_path_factory.mktemp("grown") / "run"
    small = [f"output={folder}", "rounds=1", "guidance.adversarial_weight=0", "synthesis.images_per_class=5"]
    assert "20 images" in synthesize(load_recipe(tiny_recipe, small), progress=False)
    first = {path.name: path.read_bytes() for path in folder.glob("synthetic/round-000/*.tar")}
    distilled = distill(load_recipe(tiny_recipe, small), progress=False)
    assert distilled is not None and distilled["images"] == 20
    # What `distill` has made is what `run` would make.
    assert again(tiny_recipe, folder, *small[1:]) == distilled
    result = again(tiny_recipe, folder, *small[1:3], "synthesis.images_per_class=8")
    return folder, first, result


def test_images_may_grow_in_one_round(
    grown: tuple[Path, dict[str, bytes], dict[str, Any]], tiny_recipe: Path, tmp_path: Path, made: Made
) -> None:
    folder, first, result = grown
    assert result["images"] == 32
    assert {name: (folder / "synthetic" / "round-000" / name).read_bytes() for name in first} == first
    again(tiny_recipe, tmp_path / "at-once", "rounds=1", "guidance.adversarial_weight=0")
    assert made(tmp_path / "at-once") == made(folder)
    with pytest.raises(UserError, match=r"^synthesis\.images_per_class: "):
        again(tiny_recipe, folder, "rounds=1", "guidance.adversarial_weight=0", "synthesis.images_per_class=5")
    # The student of fewer images is kept.
    kept = json.loads((folder / "superseded" / "001" / "result.json").read_text())
    assert kept["images"] == 20
    assert kept["student_sha256"] == digest(folder / "superseded" / "001" / "student" / "student.safetensors")


def test_distillation_may_be_mended_until_there_is_a_student(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one = tmp_path / "run", ["rounds=1", "guidance.adversarial_weight=0"]
    with pytest.raises(UserError, match=r"^distillation\.learning_rate: the loss is (nan|inf).*lower the rate"):
        again(tiny_recipe, folder, *one, "distillation.learning_rate=1e38", "distillation.optimizer=sgd")
    shards = {path.name: path.stat().st_mtime_ns for path in folder.glob("synthetic/round-000/*.tar")}
    # Mended once more when there are checkpoints: they are kept, too.
    with pytest.raises(RuntimeError, match="stop here"), monkeypatch.context() as patch:
        patch.setattr("diffdfkd.recipes.run.save_student", stop)
        again(tiny_recipe, folder, *one, "distillation.temperature=2.0")
    assert (folder / "student" / "checkpoints" / "latest").is_file()
    mended = again(tiny_recipe, folder, *one)
    (kept,) = folder.glob("superseded/*/student/checkpoints/latest")
    assert load_recipe(kept.parents[2] / "recipe.yaml").distillation.temperature == 2.0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("synthetic/round-000/*.tar")} == shards
    assert mended["student_sha256"] == again(tiny_recipe, tmp_path / "afresh", *one)["student_sha256"]
    with pytest.raises(UserError, match=r"^distillation\.temperature: .*distill RECIPE --images .*temperature=9"):
        again(tiny_recipe, folder, *one, "distillation.temperature=9.0")
    assert again(tiny_recipe, folder, *one) == mended


def stop(*arguments: object) -> None:
    raise RuntimeError("stop here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["synthesis.steps=2000"], r"^synthesis\.steps: got 2000; the ddim schedule"),
        (["distillation.deepspeed.zero_optimization.stge=1"], r"^distillation\.deepspeed: DeepSpeed refuses it"),
        (
            ["student.architecture=tests_tuple_student:factory", "student.options={}"],
            r"^student\.architecture: gives tuple in train mode",
        ),
    ],
)
def test_what_only_the_models_can_tell_is_said_before_an_image_is_made(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str
) -> None:
    (tmp_path / "tests_tuple_student.py").write_text(TUPLE_STUDENT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        again(tiny_recipe, tmp_path / "run", *settings)
    assert not (tmp_path / "run" / "synthetic").exists()
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_distill_needs_all_shards(tiny_recipe: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^rounds: got 2"):
        distill(load_recipe(tiny_recipe, [f"output={copy}"]), progress=False)
    with pytest.raises(UserError, match=r"^output: .*is not complete \(shard-00000\.json is missing\)"):
        distill(
            load_recipe(tiny_recipe, [f"output={tmp_path / 'none'}", "rounds=1", "guidance.adversarial_weight=0"]),
            progress=False,
        )


def test_distill_on_a_folder_of_images(tiny_recipe: Path, finished_run: Finished, tmp_path: Path) -> None:
    """Any images, of any size and without labels; the prior need not exist."""
    images = tmp_path / "images"
    images.mkdir()
    draw = random.Random(0)
    for i in range(12):
        size = 24 + 4 * (i % 3)
        Image.frombytes("RGB", (size, size), draw.randbytes(3 * size * size)).save(images / f"{i}.png")
    overrides = [f"output={tmp_path / 'run'}", "prior=/nowhere", "rounds=1", "guidance.adversarial_weight=0"]
    result = distill(load_recipe(tiny_recipe, overrides), images, progress=False)
    assert result is not None
    assert (result["images"], result["images_per_second"], result["synthesis_seconds"]) == (12, None, 0)
    assert result["student_accuracy"] is not None
    student = (tmp_path / "run" / "student" / "student.safetensors").read_bytes()
    assert distill(load_recipe(tiny_recipe, overrides), images, progress=False) == result
    assert (tmp_path / "run" / "student" / "student.safetensors").read_bytes() == student
    with pytest.raises(UserError, match=r"holds a student of .*images"):
        distill(load_recipe(tiny_recipe, overrides), finished_run[0] / "synthetic", progress=False)


def test_other_pixels_of_equal_size_are_other_images(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe)
    file = tmp_path / "images" / "a.bmp"
    file.parent.mkdir()
    digests = []
    for tone in (10, 20):
        Image.new("L", (28, 28), tone).save(file)
        digests += [foreign_images(recipe, file.parent)[1] for _ in range(2)]
        assert file.stat().st_size == 1862
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_evaluate_on_idx_and_folder_agrees_with_the_run(
    tiny_recipe: Path, finished_run: Finished, tmp_path: Path
) -> None:
    folder, result = finished_run
    recipe = load_recipe(tiny_recipe)
    student = folder / "student" / "student.safetensors"
    figures = evaluate(recipe, student, json_file=tmp_path / "out" / "figures.json", progress=False)
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures
    assert (figures["accuracy"], figures["images"]) == (result["student_accuracy"], 32)
    for key in ("per_class", "agreement", "teacher_accuracy", "calibration_error"):
        assert figures[key] == result[key]

    raw = Path(recipe.evaluation.images or "").read_bytes()[16:]
    for i in range(32):
        path = tmp_path / "real" / str(i % 4) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("L", (28, 28), raw[784 * i : 784 * (i + 1)]).save(path)
    in_folder = evaluate(recipe, student, images=tmp_path / "real", progress=False)
    assert in_folder["per_class"] == figures["per_class"]
    assert in_folder["confusion"] == figures["confusion"]


def test_evaluate_without_teacher_weights(tiny_recipe: Path, finished_run: Finished) -> None:
    recipe = load_recipe(tiny_recipe, ["teacher.weights=null"])
    figures = evaluate(recipe, finished_run[0] / "student" / "student.safetensors", progress=False)
    assert (figures["teacher_accuracy"], figures["agreement"]) == (None, None)
    assert figures["accuracy"] == finished_run[1]["student_accuracy"]
