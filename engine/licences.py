"""What the licences of prior, LoRAs and teacher say together about the student; where one is silent, so are we."""

import re
from collections.abc import Mapping

from diffdfkd.engine.recipe import Recipe

NOT_STATED = "not stated"
TEST_IMAGES = "test images"
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense", "cc-by-4.0"}
"""Licences, in small letters, that restrict no use, so that an OpenRAIL beside them is the one that binds."""


def licences(recipe: Recipe, prior: str | None, images: str | None = None) -> dict[str, str | None]:
    """Licence, or None where it is not stated, of each thing that the run used, by its name.

    ``prior`` is what the prior's own card states, ``images`` the folder that the student learnt from instead of a
    prior's images.
    """
    made_from: dict[str, str | None] = {}
    if images is None:
        made_from["prior"] = recipe.prior.licence or prior
        made_from |= {f"LoRA {lora.path}": lora.licence for lora in recipe.prior.loras}
    else:
        made_from["images"] = None
    made_from["teacher"] = recipe.teacher.licence
    if recipe.evaluation.images is not None:
        made_from[TEST_IMAGES] = recipe.evaluation.licence
    return made_from


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
