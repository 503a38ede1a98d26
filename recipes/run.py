"""A run from teacher and prior to a distilled student, its figures and its report.

diffdfkd run fashion output=runs/fashion seed=0
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError, naming
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.engines import tell_engines, with_engines
from diffdfkd.recipes.figures import finish, finished, load_student, stage
from diffdfkd.recipes.launch import launched, machine_threads, refuse_launch
from diffdfkd.recipes.run_folder import RunFolder, claim, versions

if TYPE_CHECKING:
    from diffdfkd.engine.classifier import Classifier
    from diffdfkd.engine.images import Images
    from diffdfkd.engine.journal import Journal
    from diffdfkd.engine.logits import Part
    from diffdfkd.engine.painter import Models
    from diffdfkd.engine.prior import Prior

LOOKED_AT = 50
"""Test images, evenly spread, that are decoded before a run begins."""

log = logging.getLogger(__name__)


def run(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Synthesis and distillation in rounds, evaluation, report; returns what ``result.json`` holds.

    Continues what the recipe's output folder already holds, and does nothing where that is finished. Raises UserError
    for what the user can mend.
    """
    refuse_launch("run")
    started = time.perf_counter()
    with claim(recipe) as folder:
        recipe = folder.recipe
        if (result := finished(folder, preview=True)) is not None:
            return result
        from diffdfkd.engine.synthesis import Models, synthesize

        use_device(recipe)
        prior, teacher, student, test = load(recipe)
        folder, choices = with_engines(folder, prior, teacher)
        recipe = folder.recipe
        folder.freeze()
        with session(folder, "run", time.perf_counter() - started) as journal:
            tell_engines(choices, journal)
            drop_broken_chain(folder, journal)
            for round in range(recipe.rounds):
                models = Models(prior, teacher, student_of(folder, round - 1) if round else None)
                if round == 0:
                    look_first(recipe, models, folder.path, journal)
                with stage(journal, "synthesis", recipe):
                    synthesize(recipe, models, round, folder.path, journal, progress)
                if not folder.snapshot_of(round).is_file():
                    beginner = student_of(folder, round - 1).train().requires_grad_(True) if round else student
                    with stage(journal, "distillation", recipe):
                        distil_round(beginner, teacher, folder, round, journal, progress)
            publish(folder.snapshot, folder.student)
            return finish(folder, teacher, test, journal, progress, prior_licence=prior.licence)


def look_first(recipe: Recipe, models: "Models", output: Path, journal: "Journal") -> None:
    """What comes before the first image: a light decoder's check, the preview, and what diversity is judged beside."""
    from diffdfkd.engine.cheap_steps import uses_light
    from diffdfkd.engine.gradient_cosine import check_decoder
    from diffdfkd.engine.preview import preview_pairs
    from diffdfkd.engine.reference import keep_reference

    if uses_light(recipe.guidance):
        check_decoder(recipe, models.prior, models.teacher, journal)
    with stage(journal, "preview", recipe):
        preview_pairs(recipe, models, output, journal)
    with stage(journal, "reference", recipe):
        keep_reference(recipe, models, output, journal)


def load(recipe: Recipe) -> tuple["Prior", "Classifier", "Classifier", "Images | None"]:
    """All that the recipe names: prior and teacher on its device, a fresh student and the test images."""
    from diffdfkd.engine.distillation import try_deepspeed

    teacher, student, test = load_classifiers(recipe)
    try_deepspeed(student, recipe.distillation, recipe.device)
    return load_prior_for(recipe, teacher), teacher, student, test


def load_prior_for(recipe: Recipe, teacher: "Classifier") -> "Prior":
    """The recipe's prior, once its schedule and the teacher are known to serve the recipe: those are looked at fast."""
    from diffdfkd.engine.cheap_steps import uses_light
    from diffdfkd.engine.combinations import round_samples
    from diffdfkd.engine.guidance_decoder import load_guidance_decoder
    from diffdfkd.engine.memory import fitting
    from diffdfkd.engine.painter import refuse_batch
    from diffdfkd.engine.plan import block_size
    from diffdfkd.engine.prior import load_prior
    from diffdfkd.engine.prior_files import find_prior, read_scheduler_config
    from diffdfkd.engine.schedule import late_start, make_table
    from diffdfkd.engine.taps import check_taps

    folder = find_prior(recipe.prior)  # of a hub id, by way of the network
    scheduler_config = read_scheduler_config(folder)
    table = make_table(recipe.synthesis.sampler, scheduler_config, recipe.synthesis.steps)
    if (doubt := late_start(table, scheduler_config)) is not None:
        log.warning("synthesis.steps: %s", doubt)
    if recipe.guidance.mode == "none" and not any("{}" in template for template in recipe.synthesis.templates):
        log.warning(
            "synthesis.prompt: without {} and with guidance.mode=none nothing tells the classes apart, so that the "
            "images' labels mean nothing; the teacher's answers alone teach the student"
        )
    check_taps(teacher.model, recipe.guidance)
    with fitting("prior.path", "the prior", "give prior.dtype=bfloat16, a smaller prior, or another device"):
        prior = load_prior(recipe.prior.model_copy(update={"path": str(folder)}), recipe.device)
    images = min(block_size(recipe), round_samples(recipe, 0))
    refuse_batch(prior, images, recipe.guidance.micro_batch)
    if uses_light(recipe.guidance):
        prior.guidance_decoder = load_guidance_decoder(recipe.guidance.decoder, prior)
    return prior


def load_classifiers(recipe: Recipe) -> tuple["Classifier", "Classifier", "Images | None"]:
    """Teacher, frozen, and student, fresh, on the recipe's device; test images where the recipe names some."""
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.feature_stages import stages_of_both

    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").to(recipe.device)
    student = build_classifier(recipe.student, recipe.teacher, field="student", seed=recipe.seed, trained=teacher)
    student = student.to(recipe.device)
    stages_of_both(teacher, student, recipe.distillation)
    return teacher, student, open_test(recipe)


def open_test(
    recipe: Recipe, images_from: str = "evaluation.images", labels_from: str = "evaluation.labels"
) -> "Images | None":
    """The recipe's real test images, or None; raises UserError unless all have a label.

    ``images_from`` and ``labels_from`` are where the two were given, for the errors.
    """
    from diffdfkd.engine.images import open_images

    if recipe.evaluation.images is None:
        return None
    teacher = recipe.teacher
    with naming(images_from, {labels_from: recipe.evaluation.labels}):
        images = open_images(
            recipe.evaluation.images,
            recipe.evaluation.labels,
            channels=teacher.channels,
            classes=teacher.classes,
            size=teacher.size,
            interpolation=teacher.interpolation,
            crop_fraction=teacher.crop_fraction,
        )
        # Said now rather than by the evaluation, hours later; so is damage, as far as a look here and there finds it.
        if (index := images.first_unlabelled()) is not None:
            raise UserError(
                f"{recipe.evaluation.images}: image {index} has no label; give a folder with one sub-folder a class, "
                "an IDX file, or evaluation.images=null"
            )
        last = len(images) - 1
        for index in sorted({round(last * part / LOOKED_AT) for part in range(LOOKED_AT + 1)}):
            images.read([index])
    return images


def student_of(folder: RunFolder, round: int) -> "Classifier":
    """The student as it was after a round, from its snapshot; frozen, in eval mode."""
    recipe = folder.recipe
    student = load_student(folder.snapshot_of(round), recipe)
    return student.to(recipe.device).requires_grad_(False).eval()


def drop_broken_chain(folder: RunFolder, journal: "Journal") -> None:
    """Delete snapshots that training cannot go on from, so that it starts again and arrives at the same students.

    So it is where a snapshot is damaged, and where someone deleted that of an earlier round, or the checkpoints that
    hold the optimizer.
    """
    from diffdfkd.engine.student_file import damage

    snapshots = [folder.snapshot_of(round) for round in range(folder.recipe.rounds)]
    for snapshot in snapshots:
        if snapshot.is_file() and (fault := damage(snapshot)) is not None:
            log.warning("%s is made again: %s", snapshot, fault)
            journal.log("remake", file=snapshot.name, reason=fault)
            snapshot.unlink()
    there = [snapshot.is_file() for snapshot in snapshots]
    missing = there.index(False) if False in there else len(there)
    checkpoint = (folder.path / "student" / "checkpoints" / "latest").is_file()
    if any(there[missing:]) or (0 < missing < len(there) and not checkpoint):
        for snapshot in snapshots:
            snapshot.unlink(missing_ok=True)
        journal.log("restart", reason="a snapshot or the checkpoints of an earlier round are gone")


def distil_round(
    student: "Classifier", teacher: "Classifier", folder: RunFolder, round: int, journal: "Journal", progress: bool
) -> None:
    """Train on the images of all rounds so far, up to this round's share of the steps; leaves the round's snapshot."""
    from diffdfkd.engine.distillation import distill

    recipe = folder.recipe
    images, digest = shard_images(folder, round + 1)
    summary = distill(
        student,
        teacher,
        images,
        recipe.distillation,
        folder.path / "student",
        seed=recipe.seed,
        until_step=-(-recipe.distillation.steps * (round + 1) // recipe.rounds),
        data_digest=digest,
        parts=shard_parts(folder, round + 1),
        selection=recipe.selection,
        later_round=round > 0,
        journal=journal,
        device=recipe.device,
        kernel=recipe.kernel,
        progress=progress,
    )
    journal.log("distillation", images=len(images), **asdict(summary))
    save_student(student, folder.snapshot_of(round), recipe)


def shard_images(folder: RunFolder, rounds: int) -> tuple["Images", str]:
    """Images of the shards of the first rounds, and a digest of their bytes."""
    import hashlib

    from diffdfkd.engine.pixels import Wanted
    from diffdfkd.engine.shards import list_shards, round_folder
    from diffdfkd.engine.tar_images import TarImages

    root, teacher = folder.path / "synthetic", folder.recipe.teacher
    tars: list[Path] = []
    sha256 = hashlib.sha256()
    for round in range(rounds):
        for sidecar in list_shards(root, round):
            tars.append(round_folder(root, round) / sidecar.shard)
            sha256.update(bytes.fromhex(sidecar.sha256))
    return TarImages(tars, Wanted(channels=teacher.channels, classes=teacher.classes)), sha256.hexdigest()


def shard_parts(folder: RunFolder, rounds: int) -> list["Part"]:
    """Files beside the shards of the first rounds, in which the teacher's answers to their images are kept."""
    from diffdfkd.engine.logits import Part
    from diffdfkd.engine.shards import list_shards, logits_path, round_folder

    root = folder.path / "synthetic"
    return [
        Part(logits_path(round_folder(root, round), sidecar.index), sidecar.images, sidecar.sha256)
        for round in range(rounds)
        for sidecar in list_shards(root, round)
    ]


def save_student(student: "Classifier", path: Path, recipe: Recipe) -> None:
    """Weights with what it takes to use them; equal students give equal bytes."""
    from diffdfkd.engine.student_file import write_student

    write_student(student, path, recipe)


def publish(snapshot: Path, student: Path) -> None:
    """The last snapshot under the name that scripts rely on."""
    from diffdfkd.engine.shards import write_atomic

    content = snapshot.read_bytes()
    if not student.is_file() or student.read_bytes() != content:
        write_atomic(student, content)


def use_device(recipe: Recipe) -> None:
    """Threads, a bound on memory and, on a GPU, reproducible convolutions, before the first tensor is computed."""
    import torch

    from diffdfkd.engine.memory import bound_memory, keep_freed_memory

    # Several processes of a launch share the cores, whatever one process alone took.
    torch.set_num_threads(min(recipe.threads or 1, machine_threads()) if launched() else recipe.threads or 1)
    if recipe.device == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        # float32 is float32: its ten-bit form is worth less than bfloat16, and no engine could be proven against it.
        torch.backends.cudnn.allow_tf32 = False
    else:
        bound_memory()
        if recipe.engine.freed_memory == "kept":
            keep_freed_memory()


@contextmanager
def session(folder: RunFolder, command: str, before: float = 0.0) -> Iterator["Journal"]:
    """Journal of one process's work on the run, ``before`` being the seconds that it has spent so far."""
    from diffdfkd.engine.journal import Journal
    from diffdfkd.engine.shards import remove_temporary

    remove_temporary(folder.path)
    with Journal(folder.journal, folder.path / "tensorboard") as journal:
        journal.log("session", command=command, versions=versions(), seconds_before=before)
        yield journal
