"""The corpus of bad inputs, continued: what goes wrong with the folder of a finished run, ``{folder}/run``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import yaml
from bad_image_cases import png
from bad_input_cases import Arguments, Case, Recipe, Spoil, command, given, typed
from bad_prior_cases import cut, edited, lost

STUDENT = "student/student.safetensors"


def damaged(change: Callable[[Path], object], *arguments: str) -> Spoil:
    """The finished run changed, then a command on it; by default the run's own."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        change(folder / "run")
        return typed(*arguments)(folder, recipe) if arguments else command(folder, recipe)

    return spoil


def holding(name: str, content: str) -> Callable[[Path], object]:
    """A file with this content."""
    return lambda folder: (folder / name).write_text(content)


def shards_elsewhere(folder: Path) -> None:
    """On a disk that is not there."""
    shutil.rmtree(folder / "synthetic" / "round-000")
    (folder / "synthetic" / "round-000").symlink_to("/nowhere/round-000")


def torn_journal(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2][:9] + "\n"
    (folder / "metrics.jsonl").write_text("".join(lines))


def of_an_unknown_field(folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("\nguidance:\n", "\nguidance:\n  strength: 3\n"))


def without(name: str, field: str, value: object = None) -> Callable[[Path], object]:
    """A JSON file without a top-level field, or with this value in its place."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[field]
        (folder / name).write_text(json.dumps(content if value is None else {**content, field: value}))

    return change


def without_teacher(folder: Path) -> None:
    file = folder / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    del content["teacher"]
    file.write_text(yaml.safe_dump(content))


def frozen_as_list(folder: Path) -> None:
    file = folder / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    content["frozen"]["digests"] = ["?"]
    file.write_text(yaml.safe_dump(content))


def cut_picture(folder: Path) -> None:
    cut("preview/unguided-00000.png")(folder)


def cut_sidecar(folder: Path) -> None:
    cut("synthetic/round-000/shard-00000.json")(folder)


def unfinished(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A change of a run that has its checkpoints and no student yet."""

    def both(folder: Path) -> None:
        for name in ("result.json", STUDENT, "student/round-000.safetensors"):
            (folder / name).unlink()
        change(folder)

    return both


def other_teacher(folder: Path, recipe: Recipe) -> Arguments:
    """Other weights under the name of those that the run began with."""
    state = safetensors.torch.load_file(recipe["teacher"]["weights"])
    recipe["teacher"]["weights"] = str(folder / "teacher.safetensors")
    safetensors.torch.save_file({key: value + 1 for key, value in state.items()}, recipe["teacher"]["weights"])
    return command(folder, recipe)


def other_prior(folder: Path, recipe: Recipe) -> Arguments:
    """Another schedule in the prior that the run began with."""
    recipe["prior"] = shutil.copytree(recipe["prior"], folder / "prior").as_posix()
    edited("scheduler/scheduler_config.json", beta_end=0.02)(Path(recipe["prior"]))
    return command(folder, recipe)


def images_of_another(folder: Path, recipe: Recipe) -> Arguments:
    (folder / "mine").mkdir()
    (folder / "mine" / "a.png").write_bytes(png())
    return [*command(folder, recipe, name="distill"), "--images", str(folder / "mine")]


def judged(*arguments: str, change: Callable[[Path], object] = lambda folder: None) -> Spoil:
    """The run's student, after a change of its folder, on the recipe's test images."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        change(folder / "run")
        student = ["--student", str(folder / "run" / STUDENT)] if "--student" not in arguments else []
        return [*command(folder, recipe, name="evaluate"), *student, *typed(*arguments)(folder, recipe)]

    return spoil


ANOTHER = ("{folder}/run holds a run", "another output folder")
OTHER_RECIPE = [
    Case("another seed", given("seed=5"), "seed: ", (*ANOTHER, "seed=0, now it is 5", "give seed=0")),
    Case("another batch", given("synthesis.batch_size=8"), "synthesis.batch_size: ", ANOTHER),
    Case("other steps", given("synthesis.steps=2"), "synthesis.steps: ", ANOTHER),
    Case("another guidance", given("guidance.mode=none"), "guidance.mode: ", ANOTHER),
    Case("other class names", given("teacher.classes=[a,b,c,d]"), "teacher.classes: ", ANOTHER),
    Case("other threads", given("threads=2"), "threads: ", ANOTHER),
    Case("another student", given("student.options.width=3"), "student.options.width: ", ANOTHER),
    Case(
        "a student that begins otherwise",
        given("student.weights={folder}/run/" + STUDENT),
        "student.weights: ",
        (*ANOTHER, "with student.weights=null, now", "give student.weights=null to continue"),
    ),
    Case("fewer images", given("synthesis.images_per_class=1"), "synthesis.images_per_class: ", ANOTHER),
    Case("more rounds", given("rounds=2"), "rounds: ", ANOTHER),
    Case("other selection", given("selection.balance=1"), "selection.balance: ", ("holds a student", "--images")),
    Case("other training", given("distillation.steps=5"), "distillation.steps: ", ("holds a student", "--images")),
    Case("another teacher", other_teacher, "teacher.weights: the files at {folder}/teacher.safetensors", ("another",)),
    Case("another prior", other_prior, "prior.path: the files at {folder}/prior", ("another output folder",)),
    Case(
        "a prior that is nowhere",
        given("prior={folder}/nowhere"),
        "prior.path: {folder}/nowhere: no such folder or file",
        ("hub id",),
    ),
    Case("other images", images_of_another, "output: {folder}/run holds a student of its own", ("another output",)),
]

DAMAGED = [
    Case("run's recipe cut", damaged(cut("recipe.yaml")), "output: {folder}/run/recipe.yaml", ("another output",)),
    Case(
        "run's recipe no YAML", damaged(holding("recipe.yaml", "a: [")), "output: {folder}/run/recipe.yaml", ("YAML",)
    ),
    Case("run's recipe nobody's", damaged(holding("recipe.yaml", "seed: 1")), "output: {folder}/run/recipe.yaml", ()),
    Case(
        "run's recipe of another version",
        damaged(of_an_unknown_field),
        "output: {folder}/run/recipe.yaml: guidance.strength: unknown field",
        ("another output folder",),
    ),
    Case(
        "checkpoint's name lost",
        damaged(unfinished(holding("student/checkpoints/latest", "?"))),
        "{folder}/run/student/checkpoints/latest: ",
        ("delete {folder}/run/student/checkpoints",),
    ),
    Case(
        "journal torn", damaged(torn_journal, "report", "{folder}/run"), "{folder}/run/metrics.jsonl: line 3", ("out",)
    ),
    Case(
        "result cut",
        damaged(cut("result.json"), "report", "{folder}/run"),
        "{folder}/run/result.json: damaged",
        ("give the command of the run again",),
    ),
    Case(
        "recipe cut before a report",
        damaged(cut("recipe.yaml"), "report", "{folder}/run"),
        "{folder}/run/recipe.yaml: damaged",
        ("put it back from a copy",),
    ),
    Case(
        "preview cut",
        damaged(cut("preview/preview.json"), "report", "{folder}/run"),
        "{folder}/run/preview/preview.json: damaged",
        ("again",),
    ),
    Case(
        "preview without its size",
        damaged(without("preview/preview.json", "size"), "report", "{folder}/run"),
        "{folder}/run/preview/preview.json: damaged",
        ("size", "again"),
    ),
    Case(
        "preview's picture cut",
        damaged(cut_picture, "report", "{folder}/run"),
        "{folder}/run/preview/unguided-00000.png: damaged",
        ("again", "delete {folder}/run/preview"),
    ),
    Case(
        "preview's picture gone",
        damaged(lost("preview/unguided-00000.png"), "report", "{folder}/run"),
        "{folder}/run/preview/unguided-00000.png: damaged",
        ("again",),
    ),
    Case(
        "shard cut before a report",
        damaged(cut("synthetic/round-000/shard-00000.tar"), "report", "{folder}/run"),
        "{folder}/run/synthetic/round-000/shard-00000.tar: damaged",
        ("give the command of the run again",),
    ),
    Case(
        "sidecar cut before a report",
        damaged(cut_sidecar, "report", "{folder}/run"),
        "{folder}/run/synthetic/round-000/shard-00000.json: damaged",
        ("give the command of the run again",),
    ),
    Case(
        "sidecar of other fields before a report",
        damaged(holding("synthetic/round-000/shard-00000.json", "{}"), "report", "{folder}/run"),
        "{folder}/run/synthetic/round-000/shard-00000.json: damaged",
        ("give the command of the run again", "is not a sidecar: Field required)"),
    ),
    Case(
        "sidecar cut before an export",
        damaged(cut_sidecar, "export", "{folder}/run"),
        "{folder}/run/synthetic: shard-00000.json is not a sidecar",
        ("give the command of the run again",),
    ),
    Case(
        "shard cut before an export",
        damaged(cut("synthetic/round-000/shard-00000.tar"), "export", "{folder}/run"),
        "{folder}/run/synthetic/round-000/shard-00000.tar: ",
        ("give the command of the run again",),
    ),
    *(
        Case(
            f"run's recipe {what} before {name}",
            damaged(change, name, "{folder}/run"),
            "{folder}/run/recipe.yaml: damaged",
            ("put it back from a copy", word),
        )
        for what, change, word in (
            ("without teacher", without_teacher, "teacher: missing"),
            ("of odd digests", frozen_as_list, "frozen.digests"),
        )
        for name in ("report", "export")
    ),
    Case("odd digests before a run", damaged(frozen_as_list), "output: {folder}/run/recipe.yaml", ("frozen.digests",)),
    *(
        Case(
            f"result's {field} {'mistyped' if value else 'gone'} before {name}",
            damaged(without("result.json", field, value), name, "{folder}/run"),
            "{folder}/run/result.json: damaged",
            ("give the command of the run again", field),
        )
        for field, value in (("onnx", None), ("per_class", "half"), ("images", "many"))
        for name in ("report", "export")
    ),
    Case("no run to report", typed("report", "{folder}"), "{folder}: not a folder of a run", ("diffdfkd run",)),
    Case("file to report", typed("report", "{folder}/run/recipe.yaml"), "{folder}/run/recipe.yaml: not a folder", ()),
    Case("no run to export", typed("export", "{folder}"), "{folder}: not a folder of a run", ("diffdfkd run",)),
    Case(
        "no student to export",
        damaged(lost(STUDENT), "export", "{folder}/run"),
        "{folder}/run: the run is not finished",
        ("give its command again",),
    ),
    Case(
        "result cut before an export",
        damaged(cut("result.json"), "export", "{folder}/run"),
        "{folder}/run/result.json",
        (),
    ),
    Case(
        "shard to convert cut",
        damaged(cut("synthetic/round-000/shard-00000.tar"), "convert", "{folder}/run", "{folder}/new"),
        "{folder}/run/synthetic/round-000/shard-00000.tar",
        ("again",),
    ),
    Case("nothing to convert", typed("convert", "{folder}/none", "{folder}/new"), "{folder}/none: ", ()),
    Case(
        "no shards to convert", typed("convert", "{folder}/run/preview", "{folder}/new"), "{folder}/run/preview: ", ()
    ),
    Case(
        "converted into a full folder", typed("convert", "{folder}/run", "{folder}/run"), "{folder}/run: ", ("folder",)
    ),
    Case(
        "converted below a file",
        typed("convert", "{folder}/run", "/dev/null/new"),
        "/dev/null/new: ",
        ("cannot be written",),
    ),
    Case(
        "converted to GIF",
        typed("convert", "{folder}/run", "{folder}/new", "--format", "gif"),
        "--format: got gif",
        ("png",),
    ),
    Case(
        "converted into the shards",
        typed("convert", "{folder}/run", "{folder}/run/synthetic/round-001"),
        "{folder}/run/synthetic/round-001: lies in the folder of a run",
        ("choose another",),
    ),
    Case(
        "shards by a link to nowhere",
        damaged(shards_elsewhere),
        "output: {folder}/run/synthetic/round-000 cannot be written (File exists)",
        ("take away what is in its place",),
    ),
    Case(
        "run's recipe gone",
        damaged(lambda run: (run / "recipe.yaml").unlink()),
        "output: {folder}/run holds a run whose recipe.yaml is gone",
        ("another output",),
    ),
    Case(
        "converted to no one's size",
        typed("convert", "{folder}/run", "{folder}/new", "--size", "100000"),
        "--size: got 100000",
        ("1 to 8192",),
    ),
    Case(
        "converted to no size", typed("convert", "{folder}/run", "{folder}/new", "--size", "0"), "--size: got 0", ("1",)
    ),
]

JUDGED = [
    Case("no student there", judged("--student", "/nowhere"), "--student: /nowhere: no such file", ()),
    Case("run as student", judged("--student", "{folder}/run"), "--student: {folder}/run is a folder", (STUDENT,)),
    Case("student cut", judged(change=cut(STUDENT)), "--student: {folder}/run/" + STUDENT, ("truncated",)),
    Case("text as student", judged(change=holding(STUDENT, "text")), "--student: {folder}/run/" + STUDENT, ()),
    Case(
        "student of another width",
        judged("student.options.width=4"),
        "--student: ",
        (
            "mis-shaped",
            "student.options",
            "the file says that it is a small_cnn (width 2) of 1 channel(s) and 4 classes",
        ),
    ),
    Case("no images to judge by", judged("--images", "/nowhere"), "--images: /nowhere: no such file or folder", ()),
    Case("no recipe's images", judged("evaluation.images=null"), "evaluation.images: ", ("--images",)),
    Case(
        "figures below a file",
        judged("--json", "{folder}/recipe.yaml/f.json"),
        "--json: {folder}/recipe.yaml",
        ("another file",),
    ),
    Case(
        "distil no images",
        given("output={folder}/new", "--images", "/nowhere", name="distill"),
        "--images: /nowhere",
        (),
    ),
    Case(
        "distil what is not there yet",
        given("output={folder}/new", name="distill"),
        "output: {folder}/new/synthetic is not complete",
        ("diffdfkd synthesize", "--images"),
    ),
]

CASES = [*OTHER_RECIPE, *DAMAGED, *JUDGED]
