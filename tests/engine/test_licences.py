from pathlib import Path

import pytest
import yaml

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.licences import digest_name, image_licences, inherited_licence, licences
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.engine.shards import shard_path, write_shard

RAIL = "creativeml-openrail-m"


@pytest.mark.parametrize(
    ("used", "found"),
    [
        ({"prior": "MIT", "teacher": "mit"}, ("mit", None)),
        ({"prior": RAIL, "teacher": "MIT"}, (RAIL, None)),
        ({"prior": RAIL, "LoRA 1": "openrail++", "teacher": "MIT"}, None),
        ({"prior": RAIL, "teacher": "CC-BY-NC-4.0"}, None),
        ({"prior": RAIL, "teacher": None}, None),
        ({"prior": "apache-2.0", "teacher": "MIT"}, None),
        ({"prior": "our own terms", "teacher": "our own terms"}, None),
        ({"prior": None, "teacher": None}, ("unknown", None)),
        ({"prior": RAIL, "teacher": "MIT", "test images": "anything"}, (RAIL, None)),
    ],
)
def test_what_a_student_inherits(used: dict[str, str | None], found: tuple[str, str | None] | None) -> None:
    listed = "; ".join(f"{name}: {licence or 'not stated'}" for name, licence in used.items())
    assert inherited_licence(used) == (found or ("other", listed))


def test_licences_of_a_run() -> None:
    content = {
        "prior": {"path": "p", "loras": [{"path": "lcm.safetensors", "licence": "openrail++"}, {"path": "b"}]},
        "teacher": {"architecture": "small_cnn", "weights": "t", "classes": ["a", "b"], "licence": "MIT"},
        "student": {"architecture": "small_cnn"},
        "evaluation": {"images": "images", "licence": "CC0-1.0"},
    }
    recipe = load_recipe(content)
    used = {"LoRA 1": "openrail++", "LoRA 2": None, "teacher": "MIT", "test images": "CC0-1.0"}
    assert licences(recipe, RAIL) == {"prior": RAIL, **used}
    given = recipe.model_copy(update={"prior": recipe.prior.model_copy(update={"licence": "mine"})})
    assert licences(given, RAIL)["prior"] == "mine"
    # No prior has made the images that the student learnt from.
    assert licences(recipe, RAIL, {"images": None}) == {"images": None, "teacher": "MIT", "test images": "CC0-1.0"}


def shard(folder: Path, index: int, licence: str | None) -> Path:
    write_shard(folder, index, [], round=0, digest="d", choices={}, licence=licence)
    return shard_path(folder, index)


def test_images_of_a_prior_bring_its_licence(tmp_path: Path) -> None:
    tar = shard(tmp_path / "here" / "round-000", 0, RAIL)
    assert image_licences(tmp_path / "here") == image_licences(tar) == {"images": RAIL}
    assert inherited_licence({**image_licences(tar), "teacher": "MIT"}) == (RAIL, None)
    shard(tmp_path / "here" / "round-001", 1, "MIT")
    shard(tmp_path / "here", 2, None)
    parts = ("MIT", None, RAIL)
    assert image_licences(tmp_path / "here") == {f"images, part {n}": licence for n, licence in enumerate(parts, 1)}


def test_images_of_a_stranger_bring_none(tmp_path: Path) -> None:
    assert image_licences(tmp_path) == {"images": None}
    tar = shard(tmp_path, 0, RAIL)
    tar.with_suffix(".json").rename(tmp_path / "other.json")
    tar.rename(tmp_path / "mine.tar")
    (tmp_path / "mine.json").write_text('{"count": 3}')
    assert image_licences(tmp_path) == {"images": None}


def test_damaged_sidecar_is_no_silence(tmp_path: Path) -> None:
    sidecar = shard(tmp_path, 0, RAIL).with_suffix(".json")
    sidecar.write_text(sidecar.read_text()[:40])
    with pytest.raises(UserError, match=r"shard-00000\.json: damaged, and with it the licence"):
        image_licences(tmp_path)


def test_recipe_of_the_run_that_made_the_images_is_asked_too(tmp_path: Path) -> None:
    shard(tmp_path / "run" / "synthetic" / "round-000", 0, None)
    content = {
        "prior": {"path": "p", "licence": RAIL, "loras": [{"path": "/home/someone/a", "licence": "openrail++"}]},
        "teacher": {"architecture": "small_cnn", "weights": "t", "classes": ["a", "b"]},
        "student": {"architecture": "small_cnn"},
        "frozen": {},
    }
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    assert image_licences(tmp_path / "run" / "synthetic") == {"images": RAIL, "LoRA 1 of the images": "openrail++"}
    file.write_text(file.read_text()[:30])
    with pytest.raises(UserError, match=r"recipe\.yaml: damaged, and with it the licences"):
        image_licences(tmp_path / "run" / "synthetic")


def test_digests_are_shown_by_the_same_names() -> None:
    assert [digest_name(name) for name in ("lora 0", "lora 11", "prior")] == ["LoRA 1", "LoRA 12", "prior"]
