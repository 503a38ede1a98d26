"""The ``recipe.yaml`` that a run has left in its folder: the recipe, and what was frozen with it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe


class Frozen(BaseModel):
    """What stands under ``frozen``."""

    model_config = ConfigDict(frozen=True, strict=True)

    digests: dict[str, str] = {}
    """SHA-256 by name: prior, teacher, student, lora 0, ..."""
    versions: dict[str, str | None] = {}
    images: str | None = None
    """Folder or tar that the student learns from in the place of the run's own shards."""


def frozen_fault(frozen: object) -> str | None:
    """In what way this is not what a run freezes; None where it is."""
    try:
        Frozen.model_validate(frozen)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, ('frozen', *first['loc'])))}: {first['msg']}"
    return None


def read_run_recipe(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe, the whole content) of a run's ``recipe.yaml``.

    Raises UserError that names the folder where there is none, or the file where it is damaged.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        what = "not a folder of a run (it has no recipe.yaml); name the output of diffdfkd run"
        if folder.is_file():
            what = f"not a folder of a run but a file; give the folder, such as {folder.parent}"
        elif (folder / ".lock").is_file():
            what = "a run may have begun here, but has written nothing yet; give its command, or wait for it"
        raise UserError(f"{folder}: {what}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("frozen"), dict):
            problem: str | None = "it is not what a run writes"
        elif (problem := frozen_fault(content["frozen"])) is None:
            return load_recipe(file), content
    except (yaml.YAMLError, UnicodeDecodeError, UserError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{file}: damaged; put it back from a copy, or run into another folder ({problem})")
