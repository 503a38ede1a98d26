"""Which fields of a recipe do not go together, and which steps of a trajectory are guided: plain arithmetic.

Nothing heavy is imported here, so that a mistake in a recipe costs a second.
"""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffdfkd.engine.cheap_steps import impossibly_cheap, steps_inside
from diffdfkd.engine.class_names import plain
from diffdfkd.engine.errors import UserError

if TYPE_CHECKING:
    from diffdfkd.engine.recipe import GuidanceRecipe, Recipe

MOST_SHARDS = 100_000
"""Of a run: far above what is of use, far below what fills memory and folders."""

MOST_NORMAL = 5.0
"""Above any mean and deviation of images in [0, 1], and below those of images in 0 to 255."""

PROGRAMS = ("exported", "torchscript")
"""Architectures whose weights file is the whole program: engine/programs.py."""


def guided_steps(guidance: "GuidanceRecipe", steps: int) -> list[bool]:
    """Per step, whether it is guided: each ``every``-th of those that begin inside the window.

    Raises UserError where guidance is on but the window holds the beginning of no step.
    """
    if guidance.mode == "none":
        return [False] * steps
    inside = steps_inside(guidance.window, steps)
    if not inside:
        raise UserError(
            f"guidance.window: {list(guidance.window)} holds none of the {steps} steps, which begin at multiples of "
            f"{1 / steps:.3g}; widen it, or set guidance.mode=none"
        )
    chosen = set(inside[:: guidance.every])
    return [step in chosen for step in range(steps)]


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
    if teacher.architecture in PROGRAMS and guidance.mode != "none" and guidance.batchnorm_weight > 0:
        yield (
            "guidance.batchnorm_weight",
            f"got {guidance.batchnorm_weight}, but teacher.architecture is {teacher.architecture}: L_bn needs the "
            "input of each BatchNorm layer, which a program does not show; set it to 0, or bring the module's code "
            "(package.module:factory) and its state dict",
        )
    if synthesis.words is not None and len(synthesis.words) != len(teacher.classes):
        yield "synthesis.words", f"got {len(synthesis.words)} words for {len(teacher.classes)} classes; give one each"
    elif synthesis.words is not None:
        yield from _exchanged(synthesis.words, teacher.classes)
    if synthesis.quality is not None and synthesis.format == "png":
        yield (
            "synthesis.quality",
            f"got {synthesis.quality} with synthesis.format=png, which is lossless; set synthesis.format=webp, or "
            "quality to null",
        )
    if strange := re.findall(r"\{[^{}]+\}", synthesis.prompt):
        yield "synthesis.prompt", f"got {strange[0]}, which stays as it is; the class's word goes where {{}} stands"
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
        if guidance.adversarial_weight > 0 and recipe.rounds == 1:
            yield (
                "guidance.adversarial_weight",
                f"got {guidance.adversarial_weight}, but with rounds=1 no student exists during synthesis; "
                "set rounds to 2 or more, or the weight to 0",
            )
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
    images = synthesis.images_per_class * len(teacher.classes)
    shards = -(-images // (synthesis.batch_size * synthesis.batches_per_shard))
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
    mixing = [name for name in recipe.distillation.augmentation if name in ("cutmix", "mixup")]
    if recipe.distillation.teacher_logits == "cached" and mixing:
        yield (
            "distillation.teacher_logits",
            f"cached, but {mixing[0]} makes an image of two, to which no kept answer belongs; take auto or computed, "
            f"or leave {' and '.join(mixing)} out of distillation.augmentation",
        )
    warmup, steps = recipe.distillation.warmup_steps, recipe.distillation.steps
    if warmup >= steps:
        yield (
            "distillation.warmup_steps",
            f"got {warmup} of distillation.steps={steps}: the rate would never arrive; leave steps after it",
        )
    if recipe.evaluation.labels and not recipe.evaluation.images:
        yield "evaluation.labels", "given without evaluation.images; give both, or a folder with one sub-folder a class"


def round_samples(recipe: "Recipe", round: int) -> int:
    """The run's images are dealt out to the rounds evenly, in whole sets of classes where each round can have one."""
    classes, per_class = len(recipe.teacher.classes), recipe.synthesis.images_per_class
    unit = classes if per_class >= recipe.rounds else 1
    units = classes * per_class // unit
    return unit * (units * (round + 1) // recipe.rounds - units * round // recipe.rounds)


def _exchanged(words: list[str], classes: list[str]) -> Iterable[tuple[str, str]]:
    """Words that are the names of other classes than those at their places: one of the lists is out of order.

    One alone is a coincidence, as a gift is in English and in German.
    """
    place_of = {plain(name): place for place, name in enumerate(classes)}
    found = []
    for place, (word, name) in enumerate(zip(map(plain, words), map(plain, classes), strict=True)):
        # Part of its own name, too, it may be right: a crane that is a bird beside one that is a machine.
        if word in place_of and word not in name and name not in word:
            found.append((place, place_of[word]))
    if len(found) > 1:
        (place, other), more = found[0], len(found) - 1
        yield (
            "synthesis.words",
            f"{words[place]} at place {place} would be drawn for the class {classes[place]}, but is the name of the "
            f"class at place {other}, and so for {more} more; give both lists in the order of the teacher's outputs, "
            f'or write the words otherwise where that is meant, as in "a {words[place]}"',
        )


def _no_image_left(recipe: "Recipe") -> Iterable[tuple[str, str]]:
    holdout, images = recipe.distillation.holdout, round_samples(recipe, 0)
    if holdout >= images:
        where = "" if recipe.rounds == 1 else " of the first round"
        yield "distillation.holdout", f"got {holdout} of {images} images{where}; leave some to train on"


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
    elif per_class <= recipe.rounds:
        yield (
            "cutmix.partner",
            f"within finds no partner: synthesis.images_per_class={per_class} over rounds={recipe.rounds} is at most "
            f"one image of a class a round; raise synthesis.images_per_class above {recipe.rounds}, {cure}",
        )
