"""What a run's folder does with the recipe's LoRAs, which are known by their content."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.recipes.run_folder import claim


@pytest.fixture
def with_lora(tiny_recipe: Path, tiny_lcm_lora: Path, tmp_path: Path) -> Path:
    """Recipe with a LoRA of a path relative to it."""
    content = yaml.safe_load(tiny_recipe.read_text())
    content["prior"] = {"path": content["prior"], "loras": [{"path": "./lcm.safetensors", "scale": 0.5}]}
    content["teacher"]["weights"] = str(tiny_recipe.parent / "teacher.safetensors")
    shutil.copyfile(tiny_lcm_lora, tmp_path / "lcm.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def begun(with_lora: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Claims the folder of a run that has begun with that recipe; returns the recipe as settled."""

    def claimed(*overrides: str) -> Recipe:
        with claim(load_recipe(with_lora, [f"output={tmp_path / 'run'}", *overrides])) as folder:
            folder.freeze()
            (folder.path / "synthetic" / "round-000").mkdir(parents=True, exist_ok=True)
            (folder.path / "synthetic" / "round-000" / "shard-00000.tar").touch()
            return folder.recipe

    claimed()
    return claimed


def test_paths_are_relative_to_the_recipe_and_made_absolute(begun: Callable[..., Recipe], tmp_path: Path) -> None:
    assert begun().prior.loras[0].path == str(tmp_path / "lcm.safetensors")
    frozen = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert frozen["prior"]["loras"] == [
        {"path": str(tmp_path / "lcm.safetensors"), "revision": None, "file": None, "scale": 0.5, "licence": None}
    ]
    assert len(frozen["frozen"]["digests"]["lora 0"]) == 64


def test_relative_override_is_made_absolute(
    begun: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert begun("prior.loras=[{path: lcm.safetensors, scale: 0.5}]").prior.loras[0].path == str(
        tmp_path / "lcm.safetensors"
    )


def test_home_is_ours_to_expand(with_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(with_lora, ["prior.loras=[{path: ~/lcm.safetensors}]"])
    assert recipe.prior.loras[0].path == str(tmp_path / "lcm.safetensors")
    with_lora.write_text(with_lora.read_text().replace("./lcm", "~/lcm"))
    assert load_recipe(with_lora).prior.loras[0].path == str(tmp_path / "lcm.safetensors")


def test_equal_content_at_another_path_continues_the_run(begun: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "lcm.safetensors").rename(tmp_path / "moved.safetensors")
    begun(f"prior.loras=[{{path: {tmp_path / 'moved.safetensors'}, scale: 0.5}}]")


def test_other_content_under_the_same_path_is_refused(
    begun: Callable[..., Recipe], tmp_path: Path, tiny_sd1: Path, lora_writer: Callable[..., object]
) -> None:
    lora_writer(tmp_path / "lcm.safetensors", tiny_sd1, seed=1)
    with pytest.raises(UserError, match=r"prior\.loras\.0\.path: the files at .*lcm\.safetensors are not those that"):
        begun()


@pytest.mark.parametrize("given", ["[]", "[{{path: {0}, scale: 0.6}}]", "[{{path: {0}, scale: 0.5}}, {{path: {0}}}]"])
def test_other_loras_are_refused(given: str, begun: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prior\.loras: .* holds a run with prior\.loras=.*now it is"):
        begun(f"prior.loras={given.format(tmp_path / 'lcm.safetensors')}")


def test_missing_file_is_said_before_anything_is_loaded(begun: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"prior\.loras\.0\.path: /no/such\.safetensors: no such file"):
        begun("prior.loras=[{path: /no/such.safetensors}]")


def test_lora_of_the_hub_stands_for_itself_with_its_commit(begun: Callable[..., Recipe], tmp_path: Path) -> None:
    commit = "0" * 40
    recipe = load_recipe(
        tmp_path / "recipe.yaml",
        [
            f"output={tmp_path / 'other'}",
            f"prior.loras=[{{path: some/lora, revision: '{commit}', file: x.safetensors}}]",
        ],
    )
    with claim(recipe) as folder:
        assert folder.digests["lora 0"] == f"some/lora@{commit}/x.safetensors"
