"""An axis of an ablation: variants of a recipe, one of which the others are compared with, and what all share.

    about: What each loss of the guidance brings.
    reference: both
    base: [synthesis.images_per_class=120, distillation.steps=500]
    variants:
      unguided: [guidance.mode=none]
      both: []
      oracle: {images: oracle}
    grid: {images: [300, 1000], steps: [300, 1000]}

Packaged axes lie in ``recipes/configs/ablations``, those of one recipe in a folder of its name. Paths that begin with
./ or ../ are relative to the axis's file.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Count, Section
from diffdfkd.engine.recipe_file import CONFIGS, PATHS, explain
from diffdfkd.engine.recipe_yaml import parse_yaml

AXES = CONFIGS / "ablations"

Source = Literal["synthetic", "floor", "oracle"]


class Variant(Section):
    images: Source = "synthetic"
    """What the student learns from: the recipe's own synthesis, fresh draws of the prior's own training images
    (``floor``), or the teacher's real training images (``oracle``)."""
    overrides: list[str] = Field(default=[])
    """``key=value``, relative to the axis's base."""


class Grid(Section):
    """Every variant at every pair of these; ``floor`` draws afresh at every step, so that ``images`` is not asked."""

    images: Annotated[list[Count], Field(min_length=1)] | None = None
    """Images over all classes; the recipe's own number by default."""
    steps: Annotated[list[Count], Field(min_length=1)] | None = None
    """Distillation steps; the recipe's own number by default."""

    @field_validator("images", "steps")
    @classmethod
    def _distinct(cls, values: list[int] | None) -> list[int] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("a number stands twice; give each once")
        return values


class Axis(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """That of the file."""
    about: str = ""
    """What is asked, in a sentence."""
    reference: str
    """The variant that all others are compared with."""
    base: list[str] = Field(default=[])
    """``key=value`` of all variants."""
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    grid: Grid = Grid()

    @field_validator("variants", mode="before")
    @classmethod
    def _lists_are_overrides(cls, variants: Any) -> Any:
        if not isinstance(variants, dict):
            return variants
        return {
            name: {"overrides": given} if isinstance(given, list) else given or {} for name, given in variants.items()
        }


def read_axis(name: str, recipe: str) -> Axis:
    """The axis of a packaged name or a ``.yaml`` path, for the recipe that the user named; UserError names the file."""
    path = find_axis(name, recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--axis: {path}: cannot be read ({error}); give an axis as a YAML file") from None
    content = parse_yaml(text, f"--axis: {path}")
    if not isinstance(content, dict):
        raise UserError(f"--axis: {path}: an axis is a mapping with reference and variants")
    try:
        axis = Axis.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise UserError(f"--axis: {path}: {explain(error, Axis)}") from None
    if axis.reference not in axis.variants:
        raise UserError(
            f"--axis: {path}: reference: there is no variant {axis.reference}; take one of {', '.join(axis.variants)}"
        )
    return _beside(axis, path.resolve().parent)


def _beside(axis: Axis, folder: Path) -> Axis:
    """The axis with paths that begin with ./ or ../ taken from its own folder, as in a recipe's file."""

    def settled(override: str) -> str:
        field, _, value = override.partition("=")
        near = field in PATHS and value.startswith(("./", "../"))
        return f"{field}={(folder / value).resolve()}" if near else override

    variants = {
        name: variant.model_copy(update={"overrides": [*map(settled, variant.overrides)]})
        for name, variant in axis.variants.items()
    }
    return axis.model_copy(update={"base": [*map(settled, axis.base)], "variants": variants})


def find_axis(name: str, recipe: str) -> Path:
    """File of an axis, the recipe's own before the common ones; UserError lists those that there are."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"--axis: {name}: no such file; give a .yaml file, or the name of a packaged axis")
        return Path(name)
    known = packaged_axes(recipe)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    there = f"there are {', '.join(known)}" if known else f"none is packaged for {recipe}"
    raise UserError(f"--axis: {name}: no axis of this name; {hint}{there}, or give a .yaml file")


def packaged_axes(recipe: str) -> dict[str, Path]:
    """Files of the packaged axes for a recipe's name, by their names."""
    files = [*AXES.glob("*.yaml"), *(AXES / Path(recipe).stem).glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: (file.stem, len(file.parts)))}


def without(axes: Sequence[Axis], skip: Sequence[str]) -> list[Axis]:
    """The axes without some variants; UserError for one that none has, and for a reference."""
    for name in skip:
        if not any(name in axis.variants for axis in axes):
            there = ", ".join(dict.fromkeys(variant for axis in axes for variant in axis.variants))
            raise UserError(f"--skip: there is no variant {name}; take one of {there}")
        if (needs := next((axis.name for axis in axes if axis.reference == name), None)) is not None:
            raise UserError(f"--skip: {name} is what the others of {needs} are compared with; leave it in")
    return [
        axis.model_copy(
            update={"variants": {name: variant for name, variant in axis.variants.items() if name not in skip}}
        )
        for axis in axes
    ]
