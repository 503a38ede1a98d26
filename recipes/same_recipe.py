"""Whether a recipe may go on in a folder that holds a run: fields that may differ, files that go by their content.

docs/errors.md says so to users.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffdfkd.engine.cheap_steps import uses_light
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import FULL_DECODER, LoraRecipe, Recipe, dump_recipe

MAY_DIFFER = (
    *("output", "evaluation.images", "evaluation.labels", "evaluation.batch_size", "evaluation.licence"),
    *("prior.licence", "teacher.licence", "teacher.metadata"),
    *("engine.cache", "engine.memory_mib", "engine.capabilities", "engine.freed_memory"),
)
BY_CONTENT = {
    "prior.path": "prior",
    "teacher.weights": "teacher",
    "student.weights": "student",
    "guidance.decoder": "guidance decoder",
}
"""Paths that may differ as long as what lies there has the digest that was frozen."""
NO_FILE = (None, FULL_DECODER)
"""Values of these fields that are no path."""


def file_digests(recipe: Recipe, *, prior: bool) -> dict[str, str]:
    """SHA-256 of the files that the recipe names; a hub id stands for itself with its commit."""
    from diffdfkd.engine.guidance_decoder import MAKING
    from diffdfkd.engine.prior_files import refuse_nowhere
    from diffdfkd.engine.weights import digest

    found = {}
    if prior:
        path = recipe.prior.path
        refuse_nowhere(recipe.prior)
        found["prior"] = digest(path) if Path(path).is_dir() else f"{path}@{recipe.prior.revision}"
        for index, lora in enumerate(recipe.prior.loras):
            found[f"lora {index}"] = _lora_digest(lora, f"prior.loras.{index}")
        if uses_light(recipe.guidance):
            if not Path(recipe.guidance.decoder).is_file():
                raise UserError(f"guidance.decoder: {recipe.guidance.decoder}: no such file; {MAKING}, or give 'full'")
            found[BY_CONTENT["guidance.decoder"]] = digest(recipe.guidance.decoder)
    for field in ("teacher", "student"):
        weights = getattr(recipe, field).weights
        if weights is None:
            continue
        if not Path(weights).is_file():
            if Path(weights).is_dir():
                raise UserError(f"{field}.weights: {weights}: a folder; name the file in it")
            cure = f"name the file with the {field}'s state dict"
            if field == "teacher" and recipe.about.teacher:
                cure = recipe.about.teacher
            raise UserError(f"{field}.weights: {weights}: no such file; {cure}")
        found[field] = digest(weights)
    return found


def _lora_digest(lora: LoraRecipe, field: str) -> str:
    from diffdfkd.engine.lora import find_lora
    from diffdfkd.engine.prior_files import is_commit
    from diffdfkd.engine.weights import digest

    if not Path(lora.path).exists() and is_commit(lora.revision):
        return f"{lora.path}@{lora.revision}" + (f"/{lora.file}" if lora.file else "")
    return digest(find_lora(lora, field))


def training(recipe: Recipe) -> dict[str, Any]:
    """The fields on which the course of training depends."""
    return {"distillation": recipe.distillation.course(), "selection": recipe.selection.model_dump()}


def refuse_other(
    before: Recipe,
    now: Recipe,
    frozen: Mapping[str, str],
    digests: Mapping[str, str],
    folder: Path,
    source: str | None,
) -> None:
    """UserError that names the first field in which the folder's recipe differs from this one."""
    theirs, ours = dict(_flat(dump_recipe(before))), dict(_flat(dump_recipe(now)))
    places = {name: (path, ours.get(path)) for path, name in BY_CONTENT.items()}
    places |= {f"lora {i}": (f"prior.loras.{i}.path", lora.path) for i, lora in enumerate(now.prior.loras)}
    for name, (path, place) in places.items():
        if name in frozen and name in digests and frozen[name] != digests[name]:
            raise UserError(
                f"{path}: the files at {place} are not those that the run in {folder} began with "
                f"(SHA-256 {digests[name][:12]}, was {frozen[name][:12]}); choose another output folder"
            )
    for field in [*ours, *(field for field in theirs if field not in ours)]:
        was: Any = theirs.get(field)
        now_: Any = ours.get(field)
        if was == now_ or field in MAY_DIFFER or field.startswith("about."):
            continue
        if field in BY_CONTENT and was not in NO_FILE and now_ not in NO_FILE:
            continue
        if field == "prior.loras" and [lora["scale"] for lora in was] == [lora["scale"] for lora in now_]:
            continue  # by their digests the same files, wherever they lie
        if field == "synthesis.images_per_class" and now.rounds == 1 and now_ > was:
            continue
        if field.startswith(("distillation.", "selection.")) and before.rounds == now.rounds == 1:
            if not any(folder.glob("student/*.safetensors")):
                continue  # the images do not depend on it, and no student does yet
            raise UserError(
                f"{field}: {folder} holds a student with {field}={was}, now it is {now_}; to train another one on the "
                f"same images: diffdfkd distill RECIPE --images {shlex.quote(source or str(folder / 'synthetic'))} "
                f"output=ANOTHER {shlex.quote(f'{field}={json.dumps(now_)}')}"
            )
        back = f"give {shlex.quote(f'{field}={json.dumps(was, ensure_ascii=False)}')}"
        if field not in theirs:
            back = f"leave {field} out"
        raise UserError(
            f"{field}: {folder} holds a run with {field}={_shown(was)}, now it is {_shown(now_)}; choose another "
            f"output folder, or {back} to continue that run"
        )


def _shown(value: Any) -> str:
    """As it would stand in a recipe; long ones cut."""
    text = str(value) if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
