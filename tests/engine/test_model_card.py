"""The model card: all of it from the run, nothing of the machine, hostile names harmless."""

from typing import Any

import pytest
import yaml

from diffdfkd.engine.licences import licences
from diffdfkd.engine.model_card import model_card
from diffdfkd.engine.recipe import Recipe, load_recipe

CLASSES = ["coat | tie", "<b>Shoe</b>"]
DIGESTS = {"prior": "ab" * 32, "teacher": "cd" * 32}


def recipe(**more: Any) -> Recipe:
    return load_recipe(
        {
            "prior": {"path": "/home/someone/priors/icons"},
            "teacher": {"architecture": "torchvision:resnet18", "weights": "/home/someone/t.pth", "classes": CLASSES},
            "student": {"architecture": "small_cnn", "options": {"width": 8}},
            **more,
        }
    )


RESULT: dict[str, Any] = {
    "student_accuracy": 0.8125,
    "accuracy_interval": [0.57, 0.9341],
    "teacher_accuracy": 0.9,
    "agreement": 0.75,
    "calibration_error": 0.0512,
    "per_class": dict(zip(CLASSES, (0.75, 0.875), strict=True)),
    "teacher_per_class": dict(zip(CLASSES, (0.9, 0.91), strict=True)),
    "per_class_images": dict(zip(CLASSES, (8, 8), strict=True)),
    "test_images": 16,
    "images": 4000,
    "versions": {"diffdfkd": "0.1.0"},
    "student_sha256": "ef" * 32,
    "licences": {"prior": "creativeml-openrail-m", "teacher": "MIT", "test images": None},
    "onnx": {
        "file": "student/student.onnx",
        "runtime": "onnxruntime 1",
        "images": 24,
        "max_abs": 2e-6,
        "max_rel": 3e-7,
    },
}


def front(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_says_what_the_run_knows() -> None:
    card = model_card(recipe(), RESULT, DIGESTS)
    assert front(card)["license"] == "creativeml-openrail-m" and "license_name" not in front(card)
    for words in (
        *("81.25%", "57.00% to 93.41%", "90.00%", "75.00%", "0.051", "87.50%", "91.00%", "4,000", "2.0e-06"),
        *(DIGESTS["prior"], DIGESTS["teacher"], RESULT["student_sha256"], "torchvision:resnet18", "width 8"),
        *("no image of the data that the teacher was trained on", "OpenRAIL", "| test images | not stated |"),
    ):
        assert words in card
    assert "/home/someone" not in card
    assert card == model_card(recipe(), dict(reversed(RESULT.items())), dict(reversed(DIGESTS.items())))


def test_loras_are_numbered_and_say_nothing_of_the_machine() -> None:
    lora = {"path": "/home/someone/loras/style.safetensors", "licence": "openrail++"}
    made = recipe(prior={"path": "/home/someone/priors/icons", "licence": "openrail++", "loras": [lora]})
    card = model_card(made, {**RESULT, "licences": licences(made, None)}, {**DIGESTS, "lora 0": "0a" * 32})
    assert "| LoRA 1 | style.safetensors, scale 1.0 |" in card and f"| LoRA 1, SHA-256 | {'0a' * 32} |" in card
    assert "| LoRA 1 | openrail++ |" in card
    assert "/home/someone" not in card and "lora 0" not in card


def test_names_cannot_break_out_of_a_table() -> None:
    card = model_card(recipe(), RESULT, DIGESTS)
    assert "| coat \\| tie | 75.00% |" in card
    assert "<b>" not in card and "\\<b\\>Shoe\\</b\\>" in card


def test_licences_that_differ_are_listed() -> None:
    card = model_card(recipe(), {**RESULT, "licences": {"prior": "cc0-1.0", "teacher": None}}, DIGESTS)
    assert front(card)["license"] == "other" and front(card)["license_name"] == "prior: cc0-1.0; teacher: not stated"


def test_run_without_test_images_claims_no_accuracy() -> None:
    nothing = dict.fromkeys(("student_accuracy", "accuracy_interval", "teacher_accuracy", "agreement", "per_class"))
    card = model_card(recipe(), {**RESULT, **nothing}, DIGESTS)
    assert "It has not been evaluated" in card and "nobody has measured" in card and "accuracy |" not in card


def test_images_of_ones_own_are_named_and_not_vouched_for() -> None:
    licences = {"images": None, "teacher": "MIT"}
    card = model_card(recipe(), {**RESULT, "licences": licences}, {"teacher": "cd" * 32}, "/home/someone/my-images")
    assert "my-images" in card and "/home/someone" not in card and "diffdfkd does not know" in card
    assert "without real images" not in card and "no image of the data" not in card and "prior |" not in card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"onnx": {"reason": "no operator <x>"}}, "There is no ONNX file: no operator \\<x\\>."),
        ({}, 'InferenceSession("student.onnx"'),
    ],
)
def test_onnx_or_the_reason_why_not(change: dict[str, Any], words: str) -> None:
    assert words in model_card(recipe(), {**RESULT, **change}, DIGESTS)


def test_factory_asks_for_consent_in_the_snippet() -> None:
    student = {"architecture": "mine.nets:tiny"}
    assert "allow_factory=True" in model_card(recipe(student=student), RESULT, DIGESTS)
    assert "allow_factory" not in model_card(recipe(), RESULT, DIGESTS)
