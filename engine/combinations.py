"""Which fields of a recipe do not go together, and which steps of a trajectory are guided: plain arithmetic.

Nothing heavy is imported here, so that a mistake in a recipe costs a second.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffdfkd.engine.cheap_steps import impossibly_cheap
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.windows import acting_steps, window_steps
from diffdfkd.engine.wording import impossible_words

if TYPE_CHECKING:
    from diffdfkd.engine.recipe import GuidanceRecipe, Recipe, SynthesisRecipe

MOST_SHARDS = 100_000
"""Of a run: far above what is of use, far below what fills memory and folders."""

MOST_NORMAL = 5.0
"""Above any mean and deviation of images in [0, 1], and below those of images in 0 to 255."""

PROGRAMS = ("exported", "torchscript")
"""Architectures whose weights file is the whole program: engine/programs.py."""


def guided_steps(guidance: "GuidanceRecipe", steps: int) -> list[bool]:
    """Per step, whether it is guided: each ``every``-th of those that begin inside the window, where a term acts.

    Raises UserError where guidance is on but the window, or that of a term, holds the beginning of no step.
    """
    if guidance.mode == "none":
        return [False] * steps
    inside = window_steps(guidance.window, steps)
    if not inside:
        raise UserError(
            f"guidance.window: {list(guidance.window)} holds none of the {steps} steps, which begin at multiples of "
            f"{1 / steps:.3g}; widen it, or set guidance.mode=none"
        )
    chosen = acting_steps(guidance, inside[:: guidance.every], steps)
    return [step in chosen for step in range(steps)]


def fork_step(synthesis: "SynthesisRecipe") -> int:
    """Steps of the trunk that the children of a fan-out share; all of them where none forks."""
    if synthesis.fan_out == 1:
        return synthesis.steps
    return math.floor(round(synthesis.fork * synthesis.steps, 9) + 0.5)


def step_runs(synthesis: "SynthesisRecipe") -> list[int]:
    """Per step, how often it is run for a batch and its children: once in the trunk, then once a child."""
    fork = fork_step(synthesis)
    return [1] * fork + [synthesis.fan_out] * (synthesis.steps - fork)


def guided_runs(recipe: "Recipe") -> int:
    """How often a guided step is run for a batch and its children."""
    synthesis = recipe.synthesis
    guided = guided_steps(recipe.guidance, synthesis.steps)
    return sum(run for run, steers in zip(step_runs(synthesis), guided, strict=True) if steers)


def impossible(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    """Combinations that no field can refuse alone, as (field, what is wrong and the cure)."""
    teacher, synthesis, guidance, cutmix = recipe.teacher, recipe.synthesis, recipe.guidance, recipe.cutmix
    if len(teacher.classes) < 2:
        yield "teacher.classes", f"got {len(teacher.classes)} class name(s); a classifier has two or more"
    if len(set(teacher.classes)) < len(teacher.classes):
        yield "teacher.classes", "two classes have the same name; make them distinct"
    for name in ("mean", "std"):
        values = getattr(teacher, name)
        if len(values) not in (1, teacher.channels):
            yield f"teacher.{name}", f"got {len(values)} numbers for {teacher.channels} channel(s); give 1 or one each"
        if any(not math.isfinite(value) for value in values):
            yield f"teacher.{name}", f"got {values}; finite numbers only"
        elif any(abs(value) > MOST_NORMAL for value in values):
            yield f"teacher.{name}", f"got {values}, which are of images in 0 to 255; divide mean and std by 255"
    if teacher.channel_order == "bgr" and teacher.channels == 1:
        yield "teacher.channel_order", "bgr, but teacher.channels is 1; a grey image has no order, leave it out"
    if recipe.student.architecture in PROGRAMS:
        yield (
            "student.architecture",
            f"{recipe.student.architecture} is a whole program, which can teach but not be trained; name a network, "
            "such as resnet18",
        )
    if recipe.student.initialization == "teacher":
        if recipe.student.weights is not None:
            yield (
                "student.initialization",
                f"teacher, but student.weights names {recipe.student.weights}, with which the student would begin; "
                "set student.initialization=random, or student.weights=null",
            )
        if teacher.architecture in PROGRAMS:
            yield (
                "student.initialization",
                f"teacher, but teacher.architecture is {teacher.architecture}, a whole program whose weights belong to "
                "no named layers; set student.initialization=random, or bring the module's code "
                "(package.module:factory) and its state dict",
            )
    if teacher.architecture in PROGRAMS and guidance.mode != "none" and guidance.batchnorm_weight > 0:
        yield (
            "guidance.batchnorm_weight",
            f"got {guidance.batchnorm_weight}, but teacher.architecture is {teacher.architecture}: L_bn needs the "
            "input of each BatchNorm layer, which a program does not show; set it to 0, or bring the module's code "
            "(package.module:factory) and its state dict",
        )
    if synthesis.quality is not None and synthesis.format == "png":
        yield (
            "synthesis.quality",
            f"got {synthesis.quality} with synthesis.format=png, which is lossless; set synthesis.format=webp, or "
            "quality to null",
        )
    yield from impossible_words(recipe)
    if guidance.mode != "none":
        guided_steps(guidance, synthesis.steps)
        if guidance.rho == 0:
            yield "guidance.rho", "got 0, so that each gradient would be paid for and not used; set guidance.mode=none"
        if guidance.rho_rule == "cfg" and synthesis.guidance_scale == 1:
            yield (
                "guidance.rho_rule",
                "cfg needs classifier-free guidance, but synthesis.guidance_scale is 1; take unit or raw, "
                "or another scale",
            )
        if guidance.class_weight == guidance.batchnorm_weight == guidance.adversarial_weight == 0:
            yield "guidance", "all weights are 0; set one above 0, or guidance.mode=none"
        elif guidance.class_weight == guidance.batchnorm_weight == 0:
            yield (
                "guidance",
                "class_weight and batchnorm_weight are 0, so nothing guides the first round, which has no student; "
                "set one of them above 0",
            )
        if guidance.statistics == "class" and guidance.batchnorm_weight == 0:
            yield (
                "guidance.statistics",
                "class, but guidance.batchnorm_weight is 0: there is no L_bn; raise it, or take batch",
            )
        if guidance.adversarial_weight > 0 and recipe.rounds == 1:
            yield (
                "guidance.adversarial_weight",
                f"got {guidance.adversarial_weight}, but with rounds=1 no student exists during synthesis; "
                "set rounds to 2 or more, or the weight to 0",
            )
    if guidance.micro_batch is not None:
        yield from _no_micro_batch(recipe, guidance.micro_batch)
    yield from impossibly_cheap(recipe, guided_steps(guidance, synthesis.steps))
    if cutmix.every and cutmix.probability == 0:
        yield "cutmix.probability", "got 0, so that nothing would ever be mixed; raise it, or set cutmix.every=0"
    if cutmix.every and synthesis.batch_size < 2:
        yield "cutmix.every", "CutMix needs a partner, but synthesis.batch_size is 1; raise it, or set cutmix.every=0"
    elif cutmix.every and cutmix.partner == "within":
        yield from _no_partner_within(recipe)
    if cutmix.every >= synthesis.steps:
        yield (
            "cutmix.every",
            f"got {cutmix.every} with synthesis.steps={synthesis.steps}: a mix needs a later step to repair its seam; "
            f"set it to {synthesis.steps - 1} or less, or to 0",
        )
    if cutmix.repair == "masked" and synthesis.sampler != "ddim":
        yield (
            "cutmix.repair",
            f"masked knows the noise levels of ddim alone, but synthesis.sampler is {synthesis.sampler}; take "
            "synthesis.sampler=ddim, or cutmix.repair=steps",
        )
    if synthesis.fan_out > 1:
        yield from _no_fork(recipe)
    images = synthesis.images_per_class * len(teacher.classes)
    shards = -(-images // (synthesis.batch_size * synthesis.batches_per_shard * synthesis.fan_out))
    if shards > MOST_SHARDS:
        yield (
            "synthesis.images_per_class",
            f"{images:,} images would be {shards:,} shards, a file each; at most {MOST_SHARDS:,}: lower it, or raise "
            "synthesis.batches_per_shard",
        )
    if recipe.rounds > images:
        yield "rounds", f"got {recipe.rounds} for {images} images; at most one round per image"
    if recipe.rounds > recipe.distillation.steps:
        yield "rounds", f"got {recipe.rounds} for {recipe.distillation.steps} distillation steps; at most one per step"
    yield from _no_image_left(recipe)
    yield from _no_selection(recipe)
    mixing = [name for name in recipe.distillation.augmentation if name in ("cutmix", "mixup")]
    if recipe.distillation.teacher_logits == "cached" and mixing:
        yield (
            "distillation.teacher_logits",
            f"cached, but {mixing[0]} makes an image of two, to which no kept answer belongs; take auto or computed, "
            f"or leave {' and '.join(mixing)} out of distillation.augmentation",
        )
    yield from _no_maps(recipe)
    warmup, steps = recipe.distillation.warmup_steps, recipe.distillation.steps
    if warmup >= steps:
        yield (
            "distillation.warmup_steps",
            f"got {warmup} of distillation.steps={steps}: the rate would never arrive; leave steps after it",
        )
    if recipe.evaluation.labels and not recipe.evaluation.images:
        yield "evaluation.labels", "given without evaluation.images; give both, or a folder with one sub-folder a class"


def _no_micro_batch(recipe: "Recipe", size: int) -> Iterable[tuple[str, str]]:
    engine, field = recipe.engine, "guidance.micro_batch"
    if recipe.guidance.mode not in ("clean", "none"):
        yield (
            field,
            f"got {size}, but guidance.mode is {recipe.guidance.mode}: two passes are for mode clean alone; leave it "
            "out, or set guidance.mode=clean",
        )
    if recipe.synthesis.reuse_every > 1:
        yield (
            field,
            f"got {size}, but synthesis.reuse_every is {recipe.synthesis.reuse_every}, whose features are kept for a "
            "whole batch; leave one of them out",
        )
    if size >= recipe.synthesis.batch_size:
        yield (
            field,
            f"got {size}, but a batch has {recipe.synthesis.batch_size} images; raise synthesis.batch_size, or leave "
            "it out",
        )
    for stage in ("unet", "chain"):
        if (named := getattr(engine, stage)) not in ("auto", "eager"):
            yield (
                field,
                f"got {size}, but engine.{stage} is {named}, which takes whole batches; give engine.{stage}=eager, or "
                "leave it out",
            )
    if engine.precision not in (None, recipe.prior.dtype):
        yield (
            field,
            f"got {size}, but engine.precision is {engine.precision}, which engines alone compute in; give prior.dtype "
            "instead, or leave it out",
        )


def round_samples(recipe: "Recipe", round: int) -> int:
    """The run's images are dealt out to the rounds evenly, in whole sets of classes where each round can have one.

    With fan-out the children of a set go with it.
    """
    classes, per_class = len(recipe.teacher.classes), recipe.synthesis.images_per_class
    fan_out = recipe.synthesis.fan_out
    unit = classes * fan_out if per_class // fan_out >= recipe.rounds else 1
    units = classes * per_class // unit
    return unit * (units * (round + 1) // recipe.rounds - units * round // recipe.rounds)


def _no_fork(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    """What keeps trajectories from forking into children that take boxes from each other."""
    synthesis, cutmix = recipe.synthesis, recipe.cutmix
    fan_out, per_class = synthesis.fan_out, synthesis.images_per_class
    fork = fork_step(synthesis)
    if not 1 <= fork < synthesis.steps:
        yield (
            "synthesis.fork",
            f"got {synthesis.fork} of synthesis.steps={synthesis.steps}: a fork needs a step before it and one after "
            f"it; give {1 / synthesis.steps:.3g} to {1 - 1 / synthesis.steps:.3g}, or synthesis.fan_out=1"
            if synthesis.steps > 1
            else "one step has no place for a fork; give synthesis.steps=2 or more, or synthesis.fan_out=1",
        )
    if synthesis.batch_size < 2:
        yield (
            "synthesis.fan_out",
            f"got {fan_out}, but synthesis.batch_size is 1: children take boxes from other trajectories of the batch; "
            "raise it, or set synthesis.fan_out=1",
        )
    if per_class % fan_out or per_class // fan_out < recipe.rounds:
        least = fan_out * max(recipe.rounds, -(-per_class // fan_out))
        yield (
            "synthesis.fan_out",
            f"got {fan_out} with synthesis.images_per_class={per_class} and rounds={recipe.rounds}: children have "
            "their parent's class, so each class needs a multiple of fan_out images, one of them or more a round; give "
            f"synthesis.images_per_class={least}",
        )
    if cutmix.partner == "within":
        yield from _no_partner_within(recipe)


def _no_image_left(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    holdout, images = recipe.distillation.holdout, round_samples(recipe, 0)
    if holdout >= images:
        where = "" if recipe.rounds == 1 else " of the first round"
        yield "distillation.holdout", f"got {holdout} of {images} images{where}; leave some to train on"


def _no_maps(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    """Where the class-activation losses are asked for, and something hides the feature maps that they compare."""
    distillation = recipe.distillation
    if not distillation.reads_maps:
        return
    field = "distillation.cam_weight" if distillation.cam_weight > 0 else "distillation.sarc_weight"
    off = "set distillation.cam_weight and sarc_weight to 0"
    if distillation.teacher_logits == "cached":
        yield (
            "distillation.teacher_logits",
            f"cached, but {field} compares the teacher's feature maps, which are not kept; take auto or computed, or "
            f"{off}",
        )
    if recipe.teacher.architecture in PROGRAMS:
        yield (
            field,
            f"compares feature maps, but teacher.architecture is {recipe.teacher.architecture}, a whole program, which "
            f"shows none; {off}, or bring the module's code (package.module:factory) and its state dict",
        )
    if distillation.zero_stage == 3:
        yield (
            field,
            "reads the student's classifier, which distillation.zero_stage=3 scatters over the processes; take "
            f"zero_stage 0, 1 or 2, or {off}",
        )


def _no_selection(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    selection, classes = recipe.selection, len(recipe.teacher.classes)
    if selection.disagreement > 0 and recipe.rounds == 1:
        yield (
            "selection.disagreement",
            f"got {selection.disagreement}, but with rounds=1 no student exists before the one that learns; set rounds "
            "to 2 or more, or disagreement to 0",
        )
    if selection.confidence[1] < 1 / classes:
        yield (
            "selection.confidence",
            f"got {list(selection.confidence)}, but of {classes} classes the likeliest has a probability of "
            f"{1 / classes:.3g} or more; raise the highest above that",
        )


def _no_partner_within(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    """Where no batch can hold a class twice, so that CutMix within a class would silently never mix.

    Each block of K samples of a round holds each of the K classes once: a class can come twice only in a batch that
    reaches over the end of a block.
    """
    classes, batch, per_class = (
        len(recipe.teacher.classes),
        recipe.synthesis.batch_size,
        recipe.synthesis.images_per_class,
    )
    cure = "or take cutmix.partner=across or any"
    if classes % batch == 0:
        yield (
            "cutmix.partner",
            f"within finds no partner: with synthesis.batch_size={batch} no batch holds one of the {classes} classes "
            f"twice; raise synthesis.batch_size above {classes}, {cure}",
        )
    elif per_class // recipe.synthesis.fan_out <= recipe.rounds:
        yield (
            "cutmix.partner",
            f"within finds no partner: synthesis.images_per_class={per_class} over rounds={recipe.rounds} is at most "
            f"one {'image' if recipe.synthesis.fan_out == 1 else 'trajectory'} of a class a round; raise "
            f"synthesis.images_per_class above {recipe.rounds * recipe.synthesis.fan_out}, {cure}",
        )
