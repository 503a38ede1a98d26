"""One small batch, guided and unguided, as a picture and in numbers.

diffdfkd preview fashion
"""

import json
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.table import table

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES = 24
SHOWN_LAYERS = 16
WIDTH = 100
WHICH = ("unguided", "guided")


def preview(recipe: Recipe, to: Path | None = None) -> str:
    """Write ``preview.png`` and ``preview.json`` and return what they say, for a person.

    At most 24 samples, or ``synthesis.batch_size``; classes are mixed, the noise is that of the run's first samples,
    without CutMix and fan-out. The folder is ``to``, by default <output>-preview; that of the run is refused. Raises
    UserError as ``run`` does.
    """
    from diffdfkd.engine.alarms import find_alarms
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.painter import Models, Painter, Painting, first_losses, last_losses, round_, saved_size
    from diffdfkd.engine.preview import preview_figures
    from diffdfkd.engine.shards import write_atomic
    from diffdfkd.engine.synthesis import preview_signs
    from diffdfkd.recipes.contact_sheet import contact_sheet
    from diffdfkd.recipes.launch import refuse_launch, settle_machine
    from diffdfkd.recipes.run import load_prior_for, use_device

    refuse_launch("preview")
    folder = _folder(recipe, to)
    recipe = settle_machine(recipe)
    use_device(recipe)
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").to(recipe.device)
    models = Models(load_prior_for(recipe, teacher), teacher)
    ids, classes = _samples(recipe)
    paintings: dict[str, Painting] = {}
    seconds: dict[str, float] = {}
    with Painter(recipe, models, 0) as painter:
        for which in ("unguided", "guided") if recipe.guidance.mode != "none" else ("unguided",):
            started = time.perf_counter()
            paintings[which] = painter.paint(ids, classes, guided=which == "guided", mixed=False)
            seconds[which] = time.perf_counter() - started
    guided = paintings.get("guided")
    figures = preview_figures(recipe, models, [paintings["unguided"]], [guided] if guided is not None else [])
    losses = None if guided is None else {"first": first_losses(guided.losses), "last": last_losses(guided.losses)}
    reference, signs = preview_signs(figures)
    alarms = find_alarms(recipe.guidance, signs, reference, losses) if signs and reference else []
    content = {
        **figures,
        "samples": [{"sample": id, "class": label} for id, label in zip(ids.tolist(), classes.tolist(), strict=True)],
        "not_finite": {which: int((~painting.alive).sum()) for which, painting in paintings.items()},
        "losses": losses,
        "images_per_second": {which: round_(len(ids) / spent) for which, spent in seconds.items()},
        "alarms": [{"kind": alarm.kind, "message": alarm.message} for alarm in alarms],
        "guidance": recipe.guidance.model_dump(mode="json"),
        "size": saved_size(recipe),
        "seed": recipe.seed,
    }
    picture = contact_sheet(paintings, classes, _probabilities(models, paintings), recipe.teacher.classes)
    try:
        write_atomic(folder / "preview.png", picture)
        write_atomic(folder / "preview.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"--to: {folder} cannot be written ({error.strerror}); choose another folder") from None
    return _text(recipe, content, folder)


def run_of(folder: Path) -> Path | None:
    """The folder of a run that this one is, or lies in; None for others."""
    places = (folder.resolve(), *folder.resolve().parents)
    return next((place for place in places if (place / "recipe.yaml").is_file() and (place / ".lock").exists()), None)


def _folder(recipe: Recipe, to: Path | None) -> Path:
    run = Path(recipe.output)
    folder = to if to is not None else run.with_name(f"{run.name}-preview")
    if run.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"--to: {folder} is in the run's own folder ({run}); choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: {folder} is a file; choose a folder")
    if (owner := run_of(folder)) is not None:
        raise UserError(f"--to: {folder} is in the folder of a run ({owner}); choose another folder")
    return folder


def _samples(recipe: Recipe) -> tuple["Tensor", "Tensor"]:
    """Ids and classes [n] of the run's first samples: each class as often as fits, or the first classes drawn."""
    from diffdfkd.engine.plan import trajectories

    most, classes = min(SAMPLES, recipe.synthesis.batch_size), len(recipe.teacher.classes)
    count = classes * (most // classes) if classes <= most else most
    return trajectories(recipe, 0, 0, count)


def _probabilities(models: Any, paintings: dict[str, Any]) -> dict[str, "Tensor"]:
    """[n, K] of each painting's images."""
    from diffdfkd.engine.signs import look_at

    return {which: look_at(models.teacher, painting.images).probabilities for which, painting in paintings.items()}


def _text(recipe: Recipe, content: dict[str, Any], folder: Path) -> str:
    guidance, signs = recipe.guidance, content["signs"]
    both = signs["guided"] is not None
    how = f"{guidance.mode}, {guidance.rho_rule} rho {guidance.rho:g}" if guidance.mode != "none" else "no guidance"
    head = (
        f"{len(content['samples'])} images, {len(content['by_class'])} of {len(recipe.teacher.classes)} classes "
        f"({how}, seed {recipe.seed})" + ("; arrows lead from unguided to guided" if both else "")
    )
    rows = [
        [entry["class_name"], _arrow(entry, "confidence", ".2f", both), _arrow(entry, "agreement", ".0%", both)]
        for entry in content["by_class"]
    ]
    rows.append(["all", "", _arrow(signs, "agreement", ".0%", both)])
    teacher = "the teacher\n" + table(["class", "probability of it", "likeliest for"], rows, 32)
    rate = {which: {"rate": value} for which, value in content["images_per_second"].items()}
    images = [
        ["pixels black or white", _arrow(signs, "saturated", ".0%", both)],
        ["size of latents", _arrow(signs, "latents", ".3g", both)],
        ["distance within a class", _arrow(signs, "distance", ".2f", both)],
        ["images a second", f"{_arrow(rate, 'rate', '.1f', both)}, warming up included"],
    ]
    images += [["not finite", f"{count} {which}"] for which, count in content["not_finite"].items() if count]
    alarms = [textwrap.fill(f"alarm: {alarm['message']}", WIDTH, break_on_hyphens=False) for alarm in content["alarms"]]
    return "\n\n".join(
        [
            head,
            teacher,
            _statistics(content, both, recipe.synthesis.batch_size),
            "the images\n" + table(["", ""], images).partition("\n")[2],
            *(alarms or ["no alarms"] if both else []),
            f"wrote {folder / 'preview.png'} and preview.json",
        ]
    )


def _statistics(content: dict[str, Any], both: bool, batch: int) -> str:
    if not content["layers"]:
        return "L_bn is not known: the teacher has no BatchNorm layers that can be read"
    rows = [["all, L_bn", "", "", _arrow_of(content["batchnorm"], ".3g", both)]]
    for layer in content["layers"][:SHOWN_LAYERS]:
        totals = {which: layer[which] and sum(layer[which].values()) for which in WHICH}
        mean, variance = (_arrow(layer, name, ".3g", both) for name in ("mean", "variance"))
        rows.append([layer["name"], mean, variance, _arrow_of(totals, ".3g", both)])
    left_out = len(content["layers"]) - SHOWN_LAYERS
    more = f"\n  ... and {left_out} deeper layers, which preview.json lists" if left_out > 0 else ""
    heads = ["layer", "distance of means", "of variances", "both"]
    few = len(content["samples"])
    larger = f" (a batch of {batch} is nearer)" if few < batch else ""
    head = f"how far these {few} images are from the teacher's BatchNorm statistics{larger}\n"
    return head + table(heads, rows, 40) + more


def _arrow(entry: dict[str, Any], name: str, form: str, both: bool) -> str:
    return _arrow_of({which: (entry.get(which) or {}).get(name) for which in WHICH}, form, both)


def _arrow_of(values: dict[str, float | None], form: str, both: bool) -> str:
    """``24.1 -> 9.26``, or the first alone in an unguided recipe."""
    words = ["-" if (value := values.get(which)) is None else format(value, form) for which in WHICH]
    return " -> ".join(words) if both else words[0]
