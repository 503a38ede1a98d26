"""Axes as files: those in the package fit their recipe, and what is wrong with one is said in a line."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from diffdfkd.benchmarks.ablation.axis import AXES, Axis, read_axis
from diffdfkd.benchmarks.ablation.plan import plan_runs
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe

GOOD: dict[str, Any] = {"reference": "a", "variants": {"a": [], "b": ["guidance.mode=none"]}}
PACKAGED = sorted(AXES.rglob("*.yaml"))


def exists(field: str) -> bool:
    """Whether recipes have the field."""
    model: Any = Recipe
    for part in field.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return False
        model = model.model_fields[part].annotation
    return True


def test_axes_are_packaged() -> None:
    assert {"terms", "modes", "losses", "cheap", "statistics", "budget"} <= {file.stem for file in PACKAGED}


@pytest.mark.parametrize("file", PACKAGED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_packaged_axes_fit_their_recipe(file: Path) -> None:
    axis = read_axis(str(file), file.parent.name)
    assert axis.about
    known = {
        name: variant
        for name, variant in axis.variants.items()
        if all(exists(override.partition("=")[0]) for override in variant.overrides)
    }
    runs = plan_runs(file.parent.name, ["device=cpu"], [axis.model_copy(update={"variants": known})], 2)
    assert {run.variant for run in runs} == set(known)
    digests = [run.digest for run in runs]
    assert len(set(digests)) == len(digests), "two variants are the same run"
    if unknown := set(axis.variants) - set(known):
        pytest.skip(f"recipes have no field yet for {', '.join(sorted(unknown))}")


def written(folder: Path, content: dict[str, Any]) -> str:
    (folder / "axis.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "axis.yaml")


def test_an_axis_of_lists_and_mappings(tmp_path: Path) -> None:
    variants = {**GOOD["variants"], "c": None, "d": {"images": "oracle", "overrides": ["seed=1"]}}
    axis = read_axis(written(tmp_path, {**GOOD, "variants": variants, "grid": {"images": [10, 20]}}), "any")
    assert (axis.name, axis.reference, axis.grid.images, axis.grid.steps) == ("axis", "a", [10, 20], None)
    assert [variant.images for variant in axis.variants.values()] == ["synthetic"] * 3 + ["oracle"]
    assert axis.variants["b"].overrides == ["guidance.mode=none"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": "c"}, "reference: there is no variant c; take one of a, b"),
        ({"variants": {}}, "variants: got {}"),
        ({"variants": {"a": "x"}}, "variants.a: got"),
        ({"variants": {"a": {"images": "real"}}}, "variants.a.images: got"),
        ({"grid": {"images": []}}, "grid.images: got []"),
        ({"grid": {"steps": [10, 10]}}, "grid.steps: got [10, 10]; a number stands twice"),
        ({"grids": {}}, "grids: unknown field; did you mean grid?"),
    ],
)
def test_bad_axes(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_axis(written(tmp_path, {**GOOD, **change}), "any")
    assert str(error.value).startswith(f"--axis: {tmp_path / 'axis.yaml'}: ")


def test_a_variant_that_stands_twice(tmp_path: Path) -> None:
    (tmp_path / "axis.yaml").write_text("reference: a\nvariants:\n  a: []\n  b: []\n  a: []\n")
    with pytest.raises(UserError, match="a: given twice, in line 3 and in line 5"):
        read_axis(str(tmp_path / "axis.yaml"), "any")


def test_an_unknown_axis_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"--axis: term: no axis of this name; did you mean terms\? there are .*budget"):
        read_axis("term", "fashion")
    with pytest.raises(UserError, match=r"none is packaged for mine\.yaml, or give a \.yaml file"):
        read_axis("terms", "mine.yaml")


def test_a_number_of_images_that_the_classes_cannot_share(tmp_path: Path) -> None:
    axis = Axis.model_validate({"name": "x", **GOOD, "grid": {"images": [25]}})
    with pytest.raises(UserError, match=r"x: grid.images: 25 cannot be dealt out to 10 classes"):
        plan_runs("fashion", [], [axis], 1)


def test_paths_are_taken_from_the_axis(tmp_path: Path) -> None:
    (tmp_path / "trial.yaml").write_text(
        "reference: full\nvariants: {full: [prompt=./x], light: [guidance.decoder=../light.safetensors]}\n"
    )
    axis = read_axis(str(tmp_path / "trial.yaml"), "fashion")
    assert axis.variants["light"].overrides == [f"guidance.decoder={tmp_path.parent.resolve() / 'light.safetensors'}"]
    assert axis.variants["full"].overrides == ["prompt=./x"]
    packaged = read_axis("cheap", "fashion").variants["light decoder"].overrides[0]
    assert Path(packaged.partition("=")[2]).is_file()
