import pytest

from diffdfkd.engine.licences import inherited_licence, licences
from diffdfkd.engine.recipe import load_recipe

RAIL = "creativeml-openrail-m"


@pytest.mark.parametrize(
    ("used", "found"),
    [
        ({"prior": "MIT", "teacher": "mit"}, ("mit", None)),
        ({"prior": RAIL, "teacher": "MIT"}, (RAIL, None)),
        ({"prior": RAIL, "LoRA x": "openrail++", "teacher": "MIT"}, None),
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
    used = {"LoRA lcm.safetensors": "openrail++", "LoRA b": None, "teacher": "MIT", "test images": "CC0-1.0"}
    assert licences(recipe, RAIL) == {"prior": RAIL, **used}
    given = recipe.model_copy(update={"prior": recipe.prior.model_copy(update={"licence": "mine"})})
    assert licences(given, RAIL)["prior"] == "mine"
    # No prior has made the images that the student learnt from.
    assert licences(recipe, RAIL, "/images") == {"images": None, "teacher": "MIT", "test images": "CC0-1.0"}
