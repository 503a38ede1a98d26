"""The figures of a run: its last act, ``result.json``, the student's files and the report, and their sources."""

import json
import logging
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.export import (
    complete,
    export_student,
    remake,
    run_licences,
    write_card,
    write_result,
)
from diffdfkd.recipes.launch import rank
from diffdfkd.recipes.run_folder import RunFolder, versions

if TYPE_CHECKING:
    from diffdfkd.engine.classifier import Classifier
    from diffdfkd.engine.evaluation import Evaluation
    from diffdfkd.engine.images import Images
    from diffdfkd.engine.journal import Journal

log = logging.getLogger(__name__)


def finish(
    folder: RunFolder,
    teacher: "Classifier",
    test: "Images | None",
    journal: "Journal",
    progress: bool,
    **more: Any,
) -> dict[str, Any]:
    """Evaluate the student, write its ONNX file and card, ``result.json`` and the report; returns the result."""
    from diffdfkd.engine.diversity import measure_diversity
    from diffdfkd.engine.evaluation import evaluate
    from diffdfkd.engine.reference import beside_reference
    from diffdfkd.engine.report import write_report
    from diffdfkd.engine.weights import digest
    from diffdfkd.recipes.run import shard_images

    recipe = folder.recipe
    evaluation = None
    if test is not None:
        student = load_student(folder.student, recipe)
        with stage(journal, "evaluation", recipe):
            evaluation = evaluate(
                student,
                test,
                teacher=teacher,
                batch_size=recipe.evaluation.batch_size,
                device=recipe.device,
                progress=progress,
            )
        if (doubt := no_better_than_a_guess(evaluation, len(recipe.teacher.classes))) is not None:
            log.warning("%s", doubt)
    diversity = None
    if folder.images is None:
        with stage(journal, "diversity", recipe):
            images, _ = shard_images(folder, recipe.rounds)
            diversity = measure_diversity(images, len(recipe.teacher.classes))
            diversity["beside_unguided"] = beside_reference(folder.path, teacher, images)
    licences = run_licences(folder.path, recipe, folder.images)
    with stage(journal, "export", recipe):
        onnx = export_student(folder.path, recipe, licences, digest(folder.student))
    found = {"diversity": diversity, "licences": licences, "onnx": onnx}
    result = {**figures(folder, evaluation), **found, **more}
    write_card(folder.path, recipe, result)
    # Before the result, so that a kill never leaves the report of an earlier one beside it.
    (folder.path / "report.html").unlink(missing_ok=True)
    write_result(folder.result, result)
    write_report(folder.path)
    return result


def no_better_than_a_guess(evaluation: "Evaluation", classes: int) -> str | None:
    """A word about a teacher or student that may be guessing, as far as the test images can tell; None about others."""
    from diffdfkd.engine.evaluation import wilson_interval

    def doubt(accuracy: float | None) -> str | None:
        share, count = accuracy, evaluation.images
        if share is None or wilson_interval(round(share * count), count)[0] > 1 / classes:
            return None
        guess = f"a guess among {classes} classes"
        tells = f"no better than {guess}" if share <= 1 / classes else f"which so few cannot tell from {guess}"
        return f"right on {share:.1%} of {count:,} images, {tells}"

    if (words := doubt(evaluation.teacher_accuracy)) is not None:
        return (
            f"evaluation.images: the teacher is {words}. Do teacher.classes stand in the order of its "
            "outputs, are mean, std and size its own, are the labels right? `diffdfkd check` looks into the first two"
        )
    if (words := doubt(evaluation.accuracy)) is not None:
        return (
            f"evaluation.images: the student is {words}. Try more distillation.steps, another "
            "distillation.learning_rate, or a look at the images (`diffdfkd preview`)"
        )
    return None


def load_student(weights: Path, recipe: Recipe) -> "Classifier":
    """The recipe's student with the weights of a file; raises UserError where they do not fit or are damaged."""
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.student_file import damage

    student = recipe.student.model_copy(update={"weights": str(weights)})
    classifier = build_classifier(student, recipe.teacher, field="student")
    if weights.suffix == ".safetensors" and (fault := damage(weights)) is not None:
        raise UserError(f"student.weights: {weights}: {fault}; the command of the run that made it writes it again")
    return classifier


def figures(folder: RunFolder, evaluation: "Evaluation | None") -> dict[str, Any]:
    """Content of ``result.json``; accuracies are fractions, and None without test images."""
    from diffdfkd.engine.accounts import accounts
    from diffdfkd.engine.alarms import alarms_in
    from diffdfkd.engine.journal import read_journal
    from diffdfkd.engine.weights import digest

    recipe = folder.recipe
    rows = read_journal(folder.journal)
    account = accounts(rows)
    by_class, dropped = (Counter[str](), 0) if folder.images else made_images(folder)
    last: dict[str, Any] = next((row for row in reversed(rows) if row["event"] == "distillation"), {})
    selected: dict[str, Any] = next((row for row in reversed(rows) if row["event"] == "selection"), {})
    return {
        "student_accuracy": evaluation.accuracy if evaluation else None,
        "accuracy_interval": evaluation.accuracy_interval if evaluation else None,
        "teacher_accuracy": evaluation.teacher_accuracy if evaluation else None,
        "agreement": evaluation.agreement if evaluation else None,
        "calibration_error": evaluation.calibration_error if evaluation else None,
        "calibration": evaluation.calibration if evaluation else None,
        "per_class": evaluation.per_class if evaluation else None,
        "per_class_images": evaluation.per_class_images if evaluation else None,
        "teacher_per_class": evaluation.teacher_per_class if evaluation else None,
        "test_images": evaluation.images if evaluation else None,
        "images": by_class.total() or last.get("images"),
        "dropped": dropped,
        "synthetic_per_class": {name: by_class[name] for name in recipe.teacher.classes} if by_class else None,
        "images_per_second": account.images_per_second,
        "synthesis_seconds": account.synthesis_seconds,
        "distillation_seconds": account.distillation_seconds,
        "wall_seconds": account.wall_seconds,
        "peak_memory_mib": account.peak_memory_mib,
        "memory_kind": "gpu_allocated" if recipe.device == "cuda" else "rss",
        "device": recipe.device,
        "threads": recipe.threads,
        "kernel": recipe.kernel,
        "seed": recipe.seed,
        "rounds": recipe.rounds,
        "distillation_steps": recipe.distillation.steps,
        "selection": {key: selected[key] for key in selected if key not in ("event", "time", "until_step")} or None,
        "distillation_loss": last.get("loss"),
        "holdout_agreement": last.get("holdout_agreement"),
        "versions": versions(),
        "student_sha256": digest(folder.student),
        "evaluation": recipe.evaluation.model_dump(),
        "alarms": [{key: alarm.get(key) for key in ("kind", "message", "round", "shard")} for alarm in alarms_in(rows)],
        "classes": recipe.teacher.classes,
        "confusion": evaluation.confusion if evaluation else None,
    }


def finished(folder: RunFolder, *, preview: bool = False) -> dict[str, Any] | None:
    """The result of a run to which nothing is left to do: every shard whole, the student and the figures there.

    ``preview`` says whether the command makes one, which then has to be whole as well.
    """
    from diffdfkd.engine.plan import shard_plan
    from diffdfkd.engine.preview_file import read_preview
    from diffdfkd.engine.report import write_report
    from diffdfkd.engine.result_file import read_result
    from diffdfkd.engine.shards import (
        MANIFEST,
        DamagedShard,
        manifest_fault,
        round_folder,
        shard_path,
        verify_shard,
        write_manifest,
    )
    from diffdfkd.engine.weights import digest

    recipe = folder.recipe
    if folder.grown or not folder.result.is_file() or not folder.student.is_file():
        return None
    try:
        result = read_result(folder.result)
        if preview and read_preview(folder.path) is None:
            return None
    except UserError as damage:
        log.warning("%s", damage)
        return None
    if result["student_sha256"] != digest(folder.student):
        return None
    if result["evaluation"] != recipe.evaluation.model_dump():
        return None
    plans = [] if folder.images else [plan for round in range(recipe.rounds) for plan in shard_plan(recipe, round)]
    try:
        for plan in plans:
            verify_shard(shard_path(round_folder(folder.path / "synthetic", plan.round), plan.index))
    except DamagedShard:
        return None
    if result["licences"] != run_licences(folder.path, recipe, folder.images, result["licences"]):
        return None
    root = folder.path / "synthetic"
    if plans and (fault := manifest_fault(root, recipe.rounds)):
        log.warning("%s is written again: %s", root / MANIFEST, fault)
        write_manifest(root, recipe.rounds)
    # Of the processes of a launch the first alone writes.
    if rank() == 0 and not complete(folder.path, result):
        result = remake(folder.path, recipe, result)
    if not (folder.path / "report.html").is_file():
        write_report(folder.path)
    return result


def made_images(folder: RunFolder) -> tuple[Counter[str], int]:
    """Images of each class in the run's shards, and samples that were dropped."""
    from diffdfkd.engine.plan import round_labels, shard_plan
    from diffdfkd.engine.shards import list_shards, round_folder

    recipe, root = folder.recipe, folder.path / "synthetic"
    classes = recipe.teacher.classes
    counts, dropped = Counter[str](), 0
    for round in range(recipe.rounds):
        plans = {plan.index: plan for plan in shard_plan(recipe, round)}
        for sidecar in list_shards(root, round):
            dropped += sidecar.dropped
            plan = plans.get(sidecar.index)
            if sidecar.dropped or plan is None:
                counts.update(_recorded_classes(round_folder(root, round) / sidecar.shard, classes))
            else:
                labels = round_labels(recipe, round, plan.first, plan.samples)
                counts.update(classes[label] for label in labels.tolist())
    return counts, dropped


def _recorded_classes(tar: Path, classes: list[str]) -> Iterator[str]:
    """Class name of each record in a shard."""
    with tarfile.open(tar, "r:") as shard:
        for member in shard:
            if member.name.endswith(".json") and (record := shard.extractfile(member)):
                yield classes[json.loads(record.read())["class"]]


@contextmanager
def stage(journal: "Journal", name: str, recipe: Recipe) -> Iterator[None]:
    """Log the time of a part of the run, and the process's highest memory up to its end."""
    started = time.perf_counter()
    yield
    journal.log(
        "stage",
        stage=name,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_mib=round(peak_memory(recipe), 1),
    )


def peak_memory(recipe: Recipe) -> float:
    """MiB: allocated on the GPU, or resident memory of this process on a CPU."""
    if recipe.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage also counts the parent's memory between fork and exec; the high-water mark does not.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def summary(result: dict[str, Any], output: Path) -> str:
    """What a person wants to know when the command is done."""
    lines = []
    if result["student_accuracy"] is not None:
        low, high = result["accuracy_interval"]
        lines += [
            f"student   {result['student_accuracy']:.2%} of {result['test_images']:,} real test images "
            f"(95 % interval {low:.2%} to {high:.2%})",
            f"teacher   {result['teacher_accuracy']:.2%}, the student agrees with it on {result['agreement']:.2%}",
        ]
    else:
        lines.append("student   not evaluated: evaluation.images names no real images")
    images = f"images    {result['images']:,}"
    if result["images_per_second"]:
        images += f" at {result['images_per_second']:.1f} a second, {_clock(result['synthesis_seconds'])}"
    lines.append(images)
    lines.append(
        f"time      {_clock(result['wall_seconds'])} in all, distillation {_clock(result['distillation_seconds'])}; "
        f"memory {(result['peak_memory_mib'] or 0) / 1024:.2f} GiB"
    )
    lines.append(f"report    {output / 'report.html'}")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
