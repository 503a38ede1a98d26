"""Training of the student on synthetic images and the frozen teacher's answers, by DeepSpeed.

One process by itself, or as many as ``torchrun`` or the DeepSpeed launcher started.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.augmentation import augment
from diffdfkd.engine.batches import Batches, derive_seed
from diffdfkd.engine.checkpoint import State, continuation, published, state_digest
from diffdfkd.engine.classifier import Classifier
from diffdfkd.engine.deepspeed_engine import (
    Place,
    average_buffers,
    build_engine,
    from_first,
    gathered_weights,
    load,
    mean_over_processes,
    save,
    training_processes,
)
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.feature_stages import stages_of_both
from diffdfkd.engine.images import Images
from diffdfkd.engine.journal import Journal
from diffdfkd.engine.logits import Logits, Part, answers, folder_parts, keep_logits, to_float, uses_cache
from diffdfkd.engine.losses import ActivationLosses, activation_losses
from diffdfkd.engine.memory import fitting
from diffdfkd.engine.progress import progress_bar
from diffdfkd.engine.selection import select
from diffdfkd.engine.selection_recipe import SelectionRecipe
from diffdfkd.engine.shards import canonical_json
from diffdfkd.kernels.kd_loss import kd_loss
from diffdfkd.kernels.launch import Kernel

REPORT_EVERY = 25

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationSummary:
    steps: int
    """Steps done, over all rounds."""
    start_step: int
    """Where this call began: above 0 after a resume or an earlier round."""
    seconds: float
    """Of this call, with start-up and checkpoints."""
    images_per_second: float
    """Training alone, over all processes; 0 if nothing was left to do."""
    loss: float
    """Mean over the steps that were last reported."""
    holdout_agreement: float | None
    """Share of the images held back on which student and teacher name the same class."""


def distill(
    student: Classifier,
    teacher: Classifier,
    images: Images,
    recipe: DistillationRecipe,
    output: Path,
    *,
    seed: int,
    until_step: int | None = None,
    data_digest: str,
    parts: Sequence[Part] | None = None,
    selection: SelectionRecipe | None = None,
    later_round: bool = False,
    journal: Journal,
    device: torch.device | str,
    kernel: Kernel = "auto",
    progress: bool = True,
) -> DistillationSummary:
    """Train `student`, in place, to answer as `teacher` does on augmented `images`, up to `until_step` of all steps.

    Continues from the checkpoint under ``output/checkpoints`` if that was made by the same recipe on the images of
    `data_digest`, or, with other images, if it stands where `student` stands: so each round calls with the student
    that the round before left. What is decided is journalled as event ``distill_start``, the curve as ``distill``.
    `parts` are the files that the teacher's answers are kept in, where they are; by default under ``output/logits``.
    `selection` says which images are trained on and how often; `later_round`, that `student` comes from an earlier
    round, so that its disagreement counts there. `kernel` is the form of the loss (kernels/launch.py).
    Raises UserError for impossible settings, a checkpoint that cannot be read and a loss that is not finite, and for
    networks whose feature maps the recipe's losses cannot read.
    """
    begin = time.perf_counter()
    until = recipe.steps if until_step is None else min(until_step, recipe.steps)
    cached, why = uses_cache(recipe, len(images))
    folder = Path(output) / "checkpoints"
    with training_processes(torch.device(device)) as place, _own_random_state(place.device):
        batches = Batches(
            images,
            recipe.batch_size,
            seed=seed,
            holdout=recipe.holdout,
            rank=place.rank,
            world_size=place.processes,
        )
        # On the CPU and on any GPU the convolutions are fastest with the channels last.
        teacher.to(place.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        stages = stages_of_both(teacher, student, recipe)
        digest = recipe_digest(recipe, student, teacher, seed, selection)
        ask = partial(
            keep_logits,
            teacher,
            images,
            parts or folder_parts(Path(output) / "logits", len(images), data_digest),
            dtype=recipe.dtype,
            device=place.device,
            rank=place.rank,
            processes=place.processes,
            journal=journal,
            progress=progress,
        )
        known = None
        if selection is not None and selection.acts(later_round):
            known, before = ask(), student if later_round else None
            chosen = select(selection, batches, known, before, dtype=recipe.dtype, device=place.device)
            batches.weigh(from_first(chosen.weights, place))
            if place.rank == 0:
                journal.log("selection", until_step=until, **chosen.event())
        found = published(folder)
        history, continued, reason = continuation(
            found,
            recipe=digest,
            data=data_digest,
            student=state_digest(student.state_dict()),
            until_step=until,
            processes=place.processes,
            folder=folder,
        )
        engine = build_engine(student, recipe, place)
        try:
            start, loss = 0, math.nan
            if found is not None and continued:
                load(engine, folder, found)
                start, loss = found.step, found.loss
            if place.rank == 0:
                if cached and recipe.augmentation:
                    log.warning("distillation.teacher_logits=cached, %s", why)
                journal.log(
                    "distill_start",
                    reason=reason,
                    start_step=start,
                    until_step=until,
                    images=len(images),
                    holdout=recipe.holdout,
                    processes=place.processes,
                    teacher_logits="cached" if cached else "computed",
                    teacher_logits_reason=why,
                )
            state = State(step=start, recipe=digest, processes=place.processes, history=history, loss=loss)
            speed = 0.0
            if start < until:
                logits = None
                if cached:
                    logits = ask() if known is None else known
                share = f"a batch of {recipe.batch_size // place.processes:,} images on the {place.device.type}"
                with (
                    activation_losses(teacher, engine.module, stages, recipe) as maps,
                    fitting("distillation.batch_size", share, "give a smaller one; images and checkpoints stay"),
                ):
                    learn = partial(_train, engine, teacher, logits, maps, batches, recipe, place, folder)
                    state, speed = learn(state, until, journal, kernel, progress)
            student.load_state_dict(gathered_weights(engine))
        finally:
            engine.destroy()
        agreement = _agreement(student, teacher, batches, recipe.batch_size, place.device) if recipe.holdout else None
    if place.rank == 0 and agreement is not None:
        journal.log("distill_holdout", step=until, images=recipe.holdout, agreement=agreement)
    return DistillationSummary(state.step, start, time.perf_counter() - begin, speed, state.loss, agreement)


def try_deepspeed(student: Classifier, recipe: DistillationRecipe, device: torch.device | str) -> None:
    """UserError if DeepSpeed refuses the recipe's own configuration; said before images are made rather than after."""
    if recipe.deepspeed:
        with training_processes(torch.device(device)) as place, _own_random_state(place.device):
            build_engine(student, recipe, place).destroy()


def learning_rate(recipe: DistillationRecipe, step: int) -> float:
    """Rate of a step counted from 0: linear warm-up, then the schedule over the remaining steps; no state."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "step":
        passed = sum(step >= milestone * recipe.steps for milestone in recipe.milestones)
        return recipe.learning_rate * 0.1**passed
    return recipe.learning_rate


def recipe_digest(
    recipe: DistillationRecipe,
    student: Classifier,
    teacher: Classifier,
    seed: int,
    selection: SelectionRecipe | None = None,
) -> str:
    """SHA-256 of what the student depends on besides the images and its own first weights."""
    content = {
        "recipe": recipe.course(),
        "student": [[name, str(value.dtype), list(value.shape)] for name, value in student.state_dict().items()],
        "preprocessing": repr(student.preprocessing),
        "teacher": state_digest(teacher.state_dict()),
        "seed": seed,
    }
    if selection is not None and selection != SelectionRecipe():  # which goes without saying, as in older checkpoints
        content["selection"] = selection.model_dump(mode="json")
    return hashlib.sha256(canonical_json(content)).hexdigest()


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _train(
    engine: Any,
    teacher: Classifier,
    logits: Logits | None,
    maps: ActivationLosses | None,
    batches: Batches,
    recipe: DistillationRecipe,
    place: Place,
    folder: Path,
    state: State,
    until: int,
    journal: Journal,
    kernel: Kernel,
    progress: bool,
) -> tuple[State, float]:
    """From the state's step up to `until`; the state then, and images a second over all processes."""
    engine.train()
    begin, start = time.perf_counter(), state.step
    generator = torch.Generator()
    totals: dict[str, Tensor] = {}
    counted = 0
    bar = progress_bar(until, "distillation", unit="steps", shown=progress and place.rank == 0, done=start)
    with bar:
        for step, (indices, pixels) in enumerate(batches.stream(start, until), start):
            rate = learning_rate(recipe, step)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            # Dropout draws from the global state, which is the caller's and is put back at the end.
            torch.manual_seed(derive_seed(batches.seed, "step", step, place.rank))
            generator.manual_seed(derive_seed(batches.seed, "augmentation", step, place.rank))
            images = augment(to_float(pixels, place.device), recipe.augmentation, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            if logits is not None:
                targets = logits.read(indices).to(place.device, non_blocking=True)
            else:
                targets = answers(teacher, images, recipe.dtype) if maps is None else maps.answers(images)
            loss = kd_loss(engine(images).contiguous(), targets.contiguous(), recipe.temperature, kernel=kernel)
            terms = {"loss": loss} if maps is None else maps.added(loss, targets)
            engine.backward(terms["loss"])
            engine.step()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach()
            counted += 1
            done = step + 1
            save_now = done % recipe.checkpoint_every == 0 or done == until
            # Before each checkpoint, so that none is made of a loss that is not finite.
            if save_now or done % REPORT_EVERY == 0:
                means = {name: mean_over_processes(total / counted, place) for name, total in totals.items()}
                state = state.model_copy(update={"loss": means["loss"]})
                totals, counted = {}, 0
                _report(means, rate, done, place, journal)
                bar.set_postfix(loss=f"{state.loss:.4f}", refresh=False)
            if save_now:
                average_buffers(engine.module, place)
                weights = state_digest(gathered_weights(engine)) if done == until else None
                state = state.model_copy(update={"step": done, "weights": weights})
                save(engine, folder, state, place)
            bar.update()
    return state, (until - start) * recipe.batch_size / (time.perf_counter() - begin)


def _report(losses: dict[str, float], rate: float, step: int, place: Place, journal: Journal) -> None:
    if not math.isfinite(losses["loss"]):
        raise UserError(
            f"distillation.learning_rate: the loss is {losses['loss']} at step {step}; lower the rate, or add "
            "warmup_steps"
        )
    if place.rank == 0:
        journal.log("distill", step=step, **losses, learning_rate=rate)
        for name, value in {**losses, "learning_rate": rate}.items():
            journal.scalar(f"distill/{name}", value, step)


@torch.no_grad()
def _agreement(
    student: Classifier, teacher: Classifier, batches: Batches, batch_size: int, device: torch.device
) -> float:
    training = student.training
    student.to(device).eval()
    same = 0
    for part in torch.from_numpy(batches.held).split(batch_size):
        images = to_float(batches.read_images(part), device).contiguous(memory_format=torch.channels_last)
        same += int((student(images).argmax(1) == teacher(images).argmax(1)).sum())
    student.train(training)
    return same / len(batches.held)
