"""What torchvision and timm state about their published weights, for the fields of a teacher that a recipe leaves out.

Nothing is downloaded: both packages carry sizes, normalisation and class names with their code.
"""

import difflib
import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffdfkd.engine.errors import UserError

FIELDS = ("classes", "channels", "size", "mean", "std", "interpolation", "crop_fraction")
"""Of the teacher's section, in its order."""


def fill_teacher(teacher: dict[str, Any]) -> dict[str, Any]:
    """The teacher's section with those of FIELDS that it lacks, from the weights that its ``metadata`` names.

    Packages are imported only if a field is missing. Raises UserError ``teacher.metadata: ...`` for unknown names,
    and for weights that state no class names where none are given.
    """
    missing = [name for name in FIELDS if name not in teacher]
    if not missing:
        return teacher
    source, _, name = teacher["metadata"].partition(":")
    if source == "torchvision":
        known = _torchvision(name)
    elif source == "timm":
        known = _timm(name, "classes" in missing)
    else:
        raise UserError(
            f"teacher.metadata: got {teacher['metadata']!r}; torchvision:<weights>, such as "
            "torchvision:ResNet18_Weights.IMAGENET1K_V1, or timm:<model>, such as timm:resnet18.a1_in1k"
        )
    if "classes" in missing and not known["classes"]:
        raise UserError(
            f"teacher.metadata: {teacher['metadata']} states no class names; give teacher.classes in the order of the "
            "teacher's outputs"
        )
    return {**teacher, **{name: known[name] for name in missing}}


def _torchvision(name: str) -> dict[str, Any]:
    from torchvision import models

    try:
        weights: Any = models.get_weight(name)
    except (ValueError, KeyError):
        names = [str(each) for model in models.list_models() for each in models.get_model_weights(model)]
        raise UserError(f"teacher.metadata: torchvision has no weights {name}{_near(name, names)}") from None
    preset = weights.transforms()
    if not hasattr(preset, "crop_size") or "categories" not in weights.meta:
        raise UserError(f"teacher.metadata: {name} are not the weights of an image classifier")
    return {
        "classes": distinct(weights.meta["categories"]),
        "channels": len(preset.mean),
        "size": preset.crop_size[0],
        "mean": list(preset.mean),
        "std": list(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_fraction": preset.crop_size[0] / preset.resize_size[0],
    }


def _timm(name: str, classes: bool) -> dict[str, Any]:
    try:
        registry: Any = importlib.import_module("timm.models")
    except ImportError:
        raise UserError(f"teacher.metadata: timm:{name} needs timm; pip install 'diffdfkd[timm]'") from None
    try:
        stated = registry.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        names = registry.list_pretrained()
        raise UserError(f"teacher.metadata: timm has no weights {name}{_near(name, names)}") from None
    channels, height, width = stated.input_size
    if height != width:
        raise UserError(
            f"teacher.metadata: timm:{name} takes images of {height}x{width}, and teacher.size is one number: "
            "take weights with a square input"
        )
    return {
        "classes": _timm_classes(stated) if classes else None,
        "channels": channels,
        "size": height,
        "mean": list(stated.mean),
        "std": list(stated.std),
        "interpolation": stated.interpolation,
        "crop_fraction": None if stated.crop_mode == "squash" else stated.crop_pct,
    }


def _timm_classes(stated: Any) -> list[str] | None:
    """Class names in the order of the outputs, or None where timm does not know them."""
    if stated.label_names:
        named = [(stated.label_descriptions or {}).get(label, label) for label in stated.label_names]
        return distinct(named, stated.label_names)
    data: Any = importlib.import_module("timm.data")
    subset = data.infer_imagenet_subset(stated.to_dict()) if stated.num_classes else None
    if subset is None:
        return None
    if subset == "imagenet-1k":
        # The same order, with names that are shorter and better as words of a prompt.
        from torchvision.models import ResNet18_Weights

        return distinct(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    info = data.ImageNetInfo(subset)
    if info.num_classes() != stated.num_classes:
        return None
    indices = range(info.num_classes())
    return distinct([info.index_to_description(i) for i in indices], [info.index_to_label_name(i) for i in indices])


def distinct(names: Sequence[str], hints: Sequence[str] | None = None) -> list[str]:
    """The names, those that occur more than once with their hint (such as a WordNet id) or place added."""
    counts = Counter(names)
    marked = [
        name if counts[name] == 1 else f"{name} ({hints[place] if hints else place})"
        for place, name in enumerate(names)
    ]
    if len(set(marked)) < len(marked):
        return [f"{name} ({place})" if counts[name] > 1 else name for place, name in enumerate(names)]
    return marked


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else "; its documentation lists them"
