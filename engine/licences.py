"""What the licences of prior, LoRAs and teacher say together about the student; where one is silent, so are we."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe, load_recipe

NOT_STATED = "not stated"
TEST_IMAGES = "test images"
IMAGES_FILE = "image-licences.json"
"""In a folder that `diffdfkd convert` made: what `image_licences` says of the shards that it was made from."""
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense", "cc-by-4.0"}
"""Licences, in small letters, that restrict no use, so that an OpenRAIL beside them is the one that binds."""


def licences(
    recipe: Recipe, prior: str | None, images: Mapping[str, str | None] | None = None
) -> dict[str, str | None]:
    """Licence, or None where it is not stated, of each thing that the run used, by its name.

    ``prior`` is what the prior's own card states, ``images`` what `image_licences` says of those that the student
    learnt from instead. Names say nothing about where a file lies: they end up in the student's files.
    """
    made_from: dict[str, str | None] = {}
    if images is None:
        made_from["prior"] = recipe.prior.licence or prior
        made_from |= {f"LoRA {number}": lora.licence for number, lora in enumerate(recipe.prior.loras, 1)}
    else:
        made_from |= images
    made_from["teacher"] = recipe.teacher.licence
    if recipe.evaluation.images is not None:
        made_from[TEST_IMAGES] = recipe.evaluation.licence
    return made_from


def image_licences(path: Path) -> dict[str, str | None]:
    """What is stated of the images in a folder or tar: of shards, the licence of the prior that made them.

    It stands in the sidecar beside each tar; the run's ``recipe.yaml``, where the shards still lie in its folder, adds
    what was stated later, and the LoRAs; a folder of plain images says it in a file of its own. Raises UserError for a
    sidecar or such a file that is not whole: what it said may bind.
    """
    if path.is_dir() and (files := sorted(path.rglob(IMAGES_FILE))):
        written = [_written(file) for file in files]
        if len(files) == 1:
            return written[0]
        return {f"{name}, folder {n}": licence for n, said in enumerate(written, 1) for name, licence in said.items()}
    from diffdfkd.engine.file_images import source_files
    from diffdfkd.engine.shards import SIDECAR, DamagedShard, read_sidecar

    found: dict[str, set[str | None]] = defaultdict(set)
    names = source_files(path) if path.is_dir() else [path.name]
    folder = path if path.is_dir() else path.parent
    recipes: dict[Path, Recipe | None] = {}
    for tar in (folder / name for name in names if name.lower().endswith(".tar")):
        licence, file = None, tar.with_suffix(".json")
        if file.is_file():
            try:
                licence = read_sidecar(tar).licence
            except DamagedShard as reason:
                if SIDECAR.fullmatch(file.name):
                    raise UserError(
                        f"{file}: damaged, and with it the licence of the images ({reason}); the command of the run "
                        "that made them writes it again"
                    ) from None
                # A stranger's file of its own kind beside a stranger's tar.
        if (root := tar.resolve().parent.parent) not in recipes:
            recipes[root] = _maker(root)
        if (recipe := recipes[root]) is not None:
            licence = recipe.prior.licence or licence
            for number, lora in enumerate(recipe.prior.loras, 1):
                found[f"LoRA {number} of the images"].add(lora.licence)
        found["images"].add(licence)
    stated: dict[str, str | None] = {}
    for name, several in (found or {"images": {None}}).items():
        numbered = len(several) > 1
        for number, licence in enumerate(sorted(several, key=str), 1):
            stated[f"{name}, part {number}" if numbered else name] = licence
    return dict(sorted(stated.items(), key=lambda item: (not item[0].startswith("images"), item[0])))


def _written(file: Path) -> dict[str, str | None]:
    """Content of ``image-licences.json``."""
    try:
        stated = json.loads(file.read_bytes())
    except ValueError:
        stated = None
    if not isinstance(stated, dict) or not all(isinstance(text, str | None) for text in stated.values()):
        raise UserError(
            f"{file}: damaged, and with it the licence of the images beside it; convert the shards again, or write an "
            'object such as {"images": "CC0-1.0"}'
        )
    return stated


def _maker(root: Path) -> Recipe | None:
    """Recipe of the run whose data set lies in this folder; None where it lies in none."""
    file = root.parent / "recipe.yaml"
    if root.name != "synthetic" or not file.is_file():
        return None
    try:
        return load_recipe(file)
    except UserError as error:
        raise UserError(
            f"{file}: damaged, and with it the licences of the images beside it; put it back from a copy ({error})"
        ) from None


def digest_name(name: str) -> str:
    """A name among the digests of ``recipe.yaml``, which count LoRAs from 0, as it is shown: "lora 0" is LoRA 1."""
    kind, _, number = name.partition(" ")
    return f"LoRA {int(number) + 1}" if kind == "lora" and number.isdecimal() else name


def inherited_licence(used: Mapping[str, str | None]) -> tuple[str, str | None]:
    """(``license`` of a model card, its name where that is ``other``) of a student made from these.

    A licence that all parts share is inherited as it is, in small letters as model hubs write it. An OpenRAIL among
    permissive ones binds, since it counts models trained on its model's output as derivatives. All else is ``other``
    with the list, or ``unknown`` where nothing is stated. Test images bind nothing: the student never saw them.
    """
    parts = {name: licence for name, licence in used.items() if name != TEST_IMAGES}
    stated = {licence.lower() for licence in parts.values() if licence}
    if not stated:
        return "unknown", None
    if all(parts.values()):
        binding = {licence for licence in stated if "rail" in licence} or stated
        others = stated - binding
        (first, *more) = sorted(binding)
        # Free text is the name of a licence, not an identifier that a hub knows.
        if not more and others <= PERMISSIVE and re.fullmatch(r"[a-z0-9.+-]+", first):
            return first, None
    return "other", "; ".join(f"{name}: {licence or NOT_STATED}" for name, licence in parts.items())
