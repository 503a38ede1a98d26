"""Do teacher, preprocessing, class order and prior understand each other?

diffdfkd check my-recipe.yaml
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.command import refuse_json
from diffdfkd.recipes.table import table

if TYPE_CHECKING:
    from torch import Tensor

    from diffdfkd.engine.class_order import Order
    from diffdfkd.engine.painter import Models
    from diffdfkd.engine.sanity import Judgement, Reading
    from diffdfkd.engine.signs import Layer
    from diffdfkd.recipes.check_findings import Finding

IMAGES = 100
MOST_CLASSES = 20
SHOWN_LAYERS, SHOWN_HYPOTHESES = 16, 12
NAME = 24
"""Characters of a class's name in the tables."""


def check(recipe: Recipe, *, json_file: Path | None = None, progress: bool = True) -> tuple[str, bool]:
    """What the teacher makes of unguided images, as text, and whether nothing looks wrong.

    100 images of all classes, or 5 of each of 20 classes where there are more. Nothing is written but ``json_file``,
    which gets all figures. Raises UserError as ``run`` does.
    """
    from diffdfkd.engine.class_order import better_order
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.painter import Models
    from diffdfkd.engine.sanity import hypotheses, judge, read
    from diffdfkd.recipes.check_findings import findings
    from diffdfkd.recipes.launch import refuse_launch, settle_machine
    from diffdfkd.recipes.run import load_prior_for, use_device

    refuse_launch("check")
    refuse_json(json_file)
    recipe = settle_machine(recipe)
    use_device(recipe)
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").to(recipe.device)
    models = Models(load_prior_for(recipe, teacher), teacher)
    images, asked, dropped = _draw(recipe, models, progress)
    # Of one prompt for all classes the teacher's answers say nothing.
    known = asked if all("{}" in template for template in recipe.synthesis.templates) else None
    native = max(models.prior.image_size)
    found = (read(teacher, hypothesis, images, known) for hypothesis in hypotheses(teacher.preprocessing, native))
    readings = [reading for reading in found if reading is not None]
    judgement = judge(readings)
    best = judgement.reading if judgement is not None else readings[0]
    order = None if known is None else better_order(best.look.probabilities, known, teacher.classes)
    words = findings(recipe, readings, judgement, order, known)
    sound = judgement is None and order is None
    if json_file is not None:
        _write(json_file, _figures(recipe, readings, asked, dropped, judgement, order, words, sound))
    drawn = sorted(set(asked.tolist()))
    head = (
        f"{len(asked)} unguided images of {_classes(len(drawn), len(teacher.classes))} ({recipe.synthesis.sampler}, "
        f"{recipe.synthesis.steps} steps, seed {recipe.seed}){f'; {dropped} more were not finite' if dropped else ''}"
    )
    parts = [
        head,
        _answers(readings[0], asked, teacher.classes, prompted=known is not None),
        _layers(readings[0]),
        _comparison(readings, prompted=known is not None),
        *map(str, words),
    ]
    return "\n\n".join(part for part in parts if part), sound


def _classes(drawn: int, classes: int) -> str:
    return f"{drawn} classes" if drawn == classes else f"{drawn} of the {classes} classes"


def _draw(recipe: Recipe, models: "Models", progress: bool) -> tuple["Tensor", "Tensor", int]:
    """Unguided images uint8 [N, C, H, W] as large as the prior makes them, their classes [N], and how many were lost.

    The classes take turns, so that each batch has many.
    """
    import torch

    from diffdfkd.engine.painter import Painter
    from diffdfkd.engine.plan import sample_ids
    from diffdfkd.engine.progress import progress_bar

    # Resized by the teacher's preprocessing alone, so that other sizes can be tried.
    native = recipe.synthesis.model_copy(update={"size": max(models.prior.image_size)})
    unguided = recipe.guidance.model_copy(update={"mode": "none"})
    recipe = recipe.model_copy(update={"synthesis": native, "guidance": unguided})
    classes = len(recipe.teacher.classes)
    drawn = torch.arange(min(classes, MOST_CLASSES)) * classes // min(classes, MOST_CLASSES)
    asked = drawn.repeat(max(1, IMAGES // len(drawn)))
    images, alive = [], []
    batches = asked.split(recipe.synthesis.batch_size)
    bar = progress_bar(len(asked), "unguided images", unit="images", shown=progress)
    with bar, Painter(recipe, models, 0) as painter:
        for batch, ids in zip(batches, sample_ids(0, 0, len(asked)).split(recipe.synthesis.batch_size), strict=True):
            painting = painter.paint(ids, batch, mixed=False)
            images.append(painting.images)
            alive.append(painting.alive)
            bar.update(len(batch))
    whole = torch.cat(alive)
    if not whole.any():
        raise UserError(
            f"prior: none of {len(asked)} unguided images is finite; take prior.dtype=float32 or another prior"
        )
    return torch.cat(images)[whole], asked[whole], int((~whole).sum())


def _answers(declared: "Reading", asked: "Tensor", classes: Sequence[str], *, prompted: bool) -> str:
    rows = []
    for label in sorted(set(asked.tolist())):
        own = declared.look.probabilities[asked == label]
        share = f"{(own.argmax(1) == label).float().mean().item():.0%}" if prompted else "-"
        rows.append([classes[label], share, *(f"{classes[k]} {p:.2f}" for k, p in _likeliest(own))])
    return "what the teacher takes them for\n" + table(
        ["class", "right", "likeliest, with mean probability"], rows, NAME
    )


def _likeliest(probabilities: "Tensor") -> list[tuple[int, float]]:
    """(class, mean probability) of the three likeliest classes of images of one class."""
    mean = probabilities.mean(0)
    top = mean.topk(min(3, len(mean)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _layers(declared: "Reading") -> str:
    from diffdfkd.engine.sanity import layer_distance

    layers = declared.look.layers
    if not layers:
        return ""
    rows = [
        [layer.name, str(len(layer.mean)), f"{shift:.2f}", f"{ratio:.2f}", f"{layer_distance(layer):.2f}"]
        for layer in layers
        for shift, ratio in [_moments(layer)]
    ]
    left_out = len(rows) - SHOWN_LAYERS
    heads = ["BatchNorm layer", "channels", "shift of mean", "variance ratio", "distance"]
    text = "what its BatchNorm layers see, beside what they remember from training\n"
    text += table(heads, rows[:SHOWN_LAYERS], 48)
    return text + (f"\n  ... and {left_out} deeper layers, which --json lists" if left_out > 0 else "")


def _moments(layer: "Layer") -> tuple[float, float]:
    """Mean over the channels of |mean - running mean| in standard deviations, and of the ratio of variances.

    The latter geometric: 1 is as in training, 2 and 1/2 are equally far from it.
    """
    stored = layer.running_variance + 1e-5
    shift = ((layer.mean - layer.running_mean).abs() / stored.sqrt()).mean().item()
    return shift, ((layer.variance + 1e-5) / stored).log().mean().exp().item()


def _comparison(readings: "Sequence[Reading]", *, prompted: bool) -> str:
    """The declared preprocessing and the nearest others."""
    declared, *others = readings
    shown = sorted(
        others,
        key=lambda reading: (reading.distance if reading.distance is not None else 0.0, -(reading.agreement or 0)),
    )[:SHOWN_HYPOTHESES]
    rows = []
    for reading in sorted([declared, *shown], key=lambda reading: reading.distance or 0):
        distance = "-" if reading.distance is None else f"{reading.distance:.2f}"
        agreement = "-" if reading.agreement is None else f"{reading.agreement:.0%}"
        rows.append([reading.hypothesis.name, distance, agreement])
    heads = ["preprocessing", "distance from BatchNorm", "names the class asked for"]
    left_out = len(others) - len(shown)
    more = f"\n  ... and {left_out} others, which --json lists" if left_out > 0 else ""
    return "the same images, preprocessed otherwise\n" + table(heads, rows, 48) + more


def _figures(
    recipe: Recipe,
    readings: "Sequence[Reading]",
    asked: "Tensor",
    dropped: int,
    judgement: "Judgement | None",
    order: "Order | None",
    findings: "list[Finding]",
    sound: bool,
) -> dict[str, Any]:
    from diffdfkd.engine.sanity import layer_distance

    declared = readings[0]
    classes = recipe.teacher.classes
    answers = declared.look.probabilities.argmax(1)
    by_class = []
    for label in sorted(set(asked.tolist())):
        own = asked == label
        by_class.append(
            {
                "class": label,
                "class_name": classes[label],
                "images": int(own.sum()),
                "agreement": (answers[own] == label).float().mean().item(),
                "likeliest": [
                    {"class": k, "class_name": classes[k], "probability": p}
                    for k, p in _likeliest(declared.look.probabilities[own])
                ],
                "answers": {str(k): int((answers[own] == k).sum()) for k in sorted(set(answers[own].tolist()))},
            }
        )
    return {
        "sound": sound,
        "findings": [{"text": finding.text, "set": finding.cure} for finding in findings],
        "images": len(asked),
        "dropped": dropped,
        "classes_drawn": len(by_class),
        "agreement": declared.agreement,
        "by_class": by_class,
        "layers": [
            {
                "name": layer.name,
                "channels": len(layer.mean),
                "shift": shift,
                "variance_ratio": ratio,
                "distance": layer_distance(layer),
            }
            for layer in declared.look.layers
            for shift, ratio in [_moments(layer)]
        ],
        "hypotheses": [
            {
                "name": reading.hypothesis.name,
                "fields": reading.hypothesis.changes,
                "inverted": reading.hypothesis.inverted,
                "distance": reading.distance,
                "agreement": reading.agreement,
                "confidence": reading.look.probabilities.max(1).values.mean().item(),
            }
            for reading in readings
        ],
        "better_preprocessing": None if judgement is None else judgement.reading.hypothesis.changes,
        "better_order": None if order is None else {str(label): output for label, output in order.output.items()},
    }


def _write(file: Path, figures: dict[str, Any]) -> None:
    from diffdfkd.engine.shards import write_atomic

    try:
        write_atomic(file, (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    except OSError as error:
        raise UserError(f"--json: {file} cannot be written ({error.strerror}); choose another file") from None
