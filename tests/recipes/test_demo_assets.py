"""The committed assets of the shipped recipes are the files that their provenance names."""

import gzip
import hashlib
import json
import re

import pytest

from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.gradient_cosine import compare_decoders
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.recipe_file import CONFIGS
from diffdfkd.recipes.run import load_prior_for

ASSETS = CONFIGS.parent / "assets"
RECIPES = ("fashion", "digits")
ROW = re.compile(r"(\S+\.gz) \| ([\d,]+) \| ([0-9a-f]{64}) \| ([0-9a-f]{64})")


@pytest.mark.parametrize("recipe", RECIPES)
def test_test_images_are_the_files_that_are_described(recipe: str) -> None:
    folder = ASSETS / recipe / "test"
    rows = ROW.findall((folder / "README.md").read_text(encoding="utf-8"))
    assert len(rows) == 2
    for name, size, packed, unpacked in rows:
        content = (folder / name).read_bytes()
        assert len(content) == int(size.replace(",", ""))
        assert hashlib.sha256(content).hexdigest() == packed
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == unpacked


@pytest.mark.parametrize("recipe", RECIPES)
def test_teacher_is_the_one_that_its_record_describes(recipe: str) -> None:
    record = json.loads((ASSETS / recipe / "teacher.json").read_text(encoding="utf-8"))
    content = (ASSETS / recipe / "teacher.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["sha256"]
    assert len(content) <= 2 * 2**20
    teacher = load_recipe(recipe).teacher
    assert (teacher.classes, teacher.channels, teacher.size) == (record["classes"], 1, record["size"])
    assert (teacher.mean, teacher.std) == ([record["mean"]], [pytest.approx(record["std"], abs=5e-4)])


def test_light_decoder_is_the_priors_and_leads_where_the_full_one_does() -> None:
    path = ASSETS / "fashion" / "guidance_decoder.safetensors"
    assert path.stat().st_size < 300_000
    overrides = [f"guidance.decoder={path}", "device=cpu", "kernel=reference"]
    recipe = load_recipe("fashion", overrides)
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    prior = load_prior_for(recipe, teacher)
    (found,) = compare_decoders(recipe, prior, teacher, samples=20, steps=[8])
    assert found.level == "late" and found.cosine > 0.75 and found.pixels < 0.01, found
