"""What a recipe names, and which of it is on this machine: nothing is made, fetched or loaded on a GPU."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.cheap_steps import uses_light
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import LoraRecipe, Recipe

if TYPE_CHECKING:
    from diffdfkd.engine.classifier import Classifier

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Item:
    """Something that the recipe names."""

    name: str
    """Field of the recipe, or what it is."""
    found: str | None
    """What there is; None where it is missing."""
    missing: str = ""
    """What is missing, and where to get it; or what stands in the way."""
    command: str | None = None
    """Command that fetches it, to be copied."""
    verdict: str = "MISSING"
    """Of one that is not found: ``REFUSED`` where nothing is to be got, and the recipe to be changed."""


def take_stock(recipe: Recipe) -> Iterator[Item]:
    """Prior, LoRAs, teacher, student, test images and output folder, one by one.

    Raises UserError for what is there and wrong: weights that do not fit, an unknown architecture, a data set with
    other classes, a schedule that cannot be made.
    """
    yield _prior(recipe)
    for index, lora in enumerate(recipe.prior.loras):
        yield _lora(lora, f"prior.loras.{index}")
    if uses_light(recipe.guidance):
        yield _guidance_decoder(recipe)
    yield _teacher(recipe)
    yield _student(recipe)
    yield _images(recipe)
    yield _output(recipe)


def prior_folder(recipe: Recipe) -> Path | None:
    """Folder of the prior on this machine, the hub library's cache included; None where there is none."""
    prior = recipe.prior
    if Path(prior.path).is_dir():
        return Path(prior.path)
    return _cached(prior.path, prior.revision)


def _prior(recipe: Recipe) -> Item:
    from diffdfkd.engine.prior import load_tokenizer
    from diffdfkd.engine.prior_files import (
        component_classes,
        find_weights,
        read_json,
        read_scheduler_config,
        refuse_nowhere,
    )
    from diffdfkd.engine.schedule import late_start, make_table

    prior, about = recipe.prior, recipe.about.prior
    folder, local = prior_folder(recipe), Path(prior.path).is_dir()
    command = None if local else _download(prior.path, prior.revision, _HUB_GLOBS)
    if Path(prior.path).is_file():
        refuse_nowhere(prior)
    if folder is None:
        return Item("prior", None, _nowhere(prior.path, prior.revision, about, "prior"), command)
    try:
        classes = component_classes(folder)
        variants = {find_weights(folder, component) for component in ("unet", "vae", "text_encoder")}
        scheduler = read_scheduler_config(folder)
        load_tokenizer(folder)
    except UserError as error:
        return Item("prior", None, str(error), command)
    doubt = late_start(make_table(recipe.synthesis.sampler, scheduler, recipe.synthesis.steps), scheduler)
    unet = read_json(folder / "unet" / "config.json")
    halves = ", half-precision files" if "fp16" in variants else ""
    late = f"; {doubt}" if doubt is not None else ""
    return Item(
        "prior",
        f"{prior.path}{'' if local else f' at {prior.revision}, in the cache'}: {classes['vae']}, latents of "
        f"{_sides(unet.get('sample_size'))}, {scheduler.get('prediction_type', 'epsilon')} prediction{halves}; "
        f"{recipe.synthesis.sampler} makes {recipe.synthesis.steps} steps of its schedule{late}",
    )


def _lora(lora: LoraRecipe, field: str) -> Item:
    from diffdfkd.engine.lora import PUBLISHED_NAME, find_lora

    if Path(lora.path).exists():
        return Item(field, f"{find_lora(lora, field)}, scale {lora.scale:g}")
    name = lora.file or PUBLISHED_NAME
    folder = _cached(lora.path, lora.revision)
    if folder is not None and (folder / name).is_file():
        return Item(field, f"{lora.path} at {lora.revision}, in the cache, scale {lora.scale:g}")
    command = _download(lora.path, lora.revision, (name,))
    return Item(field, None, _nowhere(lora.path, lora.revision, None, field), command)


def _guidance_decoder(recipe: Recipe) -> Item:
    from diffdfkd.engine.guidance_decoder import MAKING, read_guidance_decoder

    path = recipe.guidance.decoder
    if not Path(path).is_file():
        return Item("guidance.decoder", None, f"{path}: no such file; {MAKING}")
    shape = read_guidance_decoder(Path(path)).shape
    return Item("guidance.decoder", f"{path}: {shape.form}, latents enlarged {shape.scale} times")


def _teacher(recipe: Recipe) -> Item:
    from diffdfkd.engine.classifier import build_classifier, build_model
    from diffdfkd.engine.feature_stages import stages_of
    from diffdfkd.engine.taps import check_taps, tappable

    teacher = recipe.teacher
    if teacher.weights is None:
        return Item("teacher.weights", None, "the recipe names none; name the file with the teacher's state dict")
    if not Path(teacher.weights).exists():
        if teacher.architecture not in ("exported", "torchscript"):
            # The architecture and its options, at least.
            build_model(teacher.architecture, teacher.options, teacher.channels, len(teacher.classes), field="teacher")
        where = f"; {recipe.about.teacher}" if recipe.about.teacher else ""
        return Item("teacher.weights", None, f"{teacher.weights}: no such file{where}")
    built = build_classifier(teacher, teacher, field="teacher")
    check_taps(built.model, recipe.guidance)
    if recipe.distillation.reads_maps:
        stages_of(built, recipe.distillation, "teacher")
    found = f"{_counts(built)}, {len(tappable(built.model))} BatchNorm layers to read"
    return Item("teacher", f"{teacher.architecture} from {teacher.weights}: {found}")


def _student(recipe: Recipe) -> Item:
    from diffdfkd.engine.feature_stages import stages_of

    weights = recipe.student.weights
    if weights is not None and not Path(weights).is_file():
        return Item("student.weights", None, f"{weights}: no such file")
    inherits = recipe.student.initialization == "teacher"
    start = f"begins from {weights}" if weights else "begins with weights of the teacher" if inherits else "new"
    built = student(recipe)
    if recipe.distillation.reads_maps:
        stages_of(built, recipe.distillation, "student")
    return Item("student", f"{recipe.student.architecture}: {_counts(built)}, {start}")


def student(recipe: Recipe) -> "Classifier":
    """The recipe's student as a run would begin with it, without its weights where they are missing."""
    from diffdfkd.engine.classifier import build_classifier

    chosen = recipe.student
    if chosen.weights is not None and not Path(chosen.weights).is_file():
        chosen = chosen.model_copy(update={"weights": None})
    if recipe.teacher.weights is None or not Path(recipe.teacher.weights).is_file():
        chosen = chosen.model_copy(update={"initialization": "random"})
    return build_classifier(chosen, recipe.teacher, field="student", seed=recipe.seed)


def _counts(classifier: "Classifier") -> str:
    return f"{sum(weight.numel() for weight in classifier.parameters()):,} parameters"


def _images(recipe: Recipe) -> Item:
    from diffdfkd.recipes.run import open_test

    evaluation = recipe.evaluation
    if evaluation.images is None:
        return Item("evaluation.images", "none: the student will not be evaluated")
    for field, path in (("evaluation.images", evaluation.images), ("evaluation.labels", evaluation.labels)):
        if path is not None and not Path(path).exists():
            where = f"; {recipe.about.images}" if recipe.about.images else ""
            return Item(field, None, f"{path}: no such file or folder{where}")
    images = open_test(recipe)
    assert images is not None
    return Item("evaluation.images", f"{evaluation.images}: {len(images):,} labelled images")


def _output(recipe: Recipe) -> Item:
    from diffdfkd.recipes.run_folder import holds_run, in_use

    folder = Path(recipe.output)
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Item("output", None, f"{folder} cannot be written; choose another folder", verdict="REFUSED")
    if in_use(folder):
        return Item("output", None, f"{folder}: another process works on it now; wait for it", verdict="REFUSED")
    try:
        if holds_run(recipe):
            return Item("output", f"{folder} holds a run of this recipe, which the command continues")
    except UserError as error:
        return Item("output", None, str(error), verdict="REFUSED")
    state = "to be made"
    if folder.is_dir():
        state = "empty" if not any(folder.iterdir()) else "which holds files of something else: they stay"
    return Item("output", f"{folder}, {state}")


def _cached(repository: str, revision: str | None) -> Path | None:
    """Folder of a hub repository at a commit in the hub library's cache, whole or not; None where it is not there."""
    if not HUB_ID.fullmatch(repository) or not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


_HUB_GLOBS = (
    *("*.json", "tokenizer/*", "README.md"),
    *("*/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
)


def _download(repository: str, revision: str | None, globs: tuple[str, ...]) -> str | None:
    """Command that fetches those files, where the repository and its commit are named."""
    if not HUB_ID.fullmatch(repository) or revision is None:
        return None
    chosen = " ".join(f'--include "{pattern}"' for pattern in globs)
    return f"hf download {repository} --revision {revision} {chosen}"


def _nowhere(path: str, revision: str | None, about: str | None, field: str) -> str:
    if HUB_ID.fullmatch(path) and revision is not None:
        problem = f"{path} at {revision} is not in the hub cache; the run would fetch it"
    elif HUB_ID.fullmatch(path):
        problem = f"{path} is no folder here, and as a hub id it needs {field}.revision, a commit of 40 digits"
    else:
        problem = f"{path}: no such folder or file"
    return f"{problem}; {about}" if about else problem


def _sides(size: Any) -> str:
    sides = size if isinstance(size, list) else [size, size]
    return "x".join(str(side) for side in sides)
