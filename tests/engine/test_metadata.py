import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchvision import models

from diffdfkd.engine.classifier import Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.metadata import FIELDS, distinct, fill_teacher
from diffdfkd.engine.recipe import TeacherRecipe, load_recipe

RESNET = "torchvision:ResNet18_Weights.IMAGENET1K_V1"


def fill(metadata: str, **given: Any) -> dict[str, Any]:
    return fill_teacher({"architecture": "torchvision:resnet18", "metadata": metadata, **given})


def test_torchvisions_weights_fill_in_what_is_not_given() -> None:
    filled = fill(RESNET)
    assert (filled["channels"], filled["size"], filled["crop_fraction"]) == (3, 224, 0.875)
    assert filled["mean"] == [0.485, 0.456, 0.406] and filled["std"] == [0.229, 0.224, 0.225]
    assert filled["interpolation"] == "bilinear"
    assert len(filled["classes"]) == 1000 == len(set(filled["classes"])) and filled["classes"][0] == "tench"
    assert TeacherRecipe.model_validate(filled).size == 224
    own = fill(RESNET, size=64, classes=["a", "b"], mean=[0.5])
    assert (own["size"], own["classes"], own["mean"], own["std"]) == (64, ["a", "b"], [0.5], filled["std"])


def test_the_filled_preprocessing_is_torchvisions() -> None:
    filled = fill("torchvision:ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1")
    images = torch.rand(2, 3, 384, 384)
    ours = Preprocessing(3, filled["size"], tuple(filled["mean"]), tuple(filled["std"]), filled["interpolation"])(
        images
    )
    theirs = models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms()(images)
    assert filled["crop_fraction"] == 1 and filled["interpolation"] == "bicubic"
    torch.testing.assert_close(ours, theirs)


def test_timms_configurations_fill_in_what_is_not_given() -> None:
    pytest.importorskip("timm")
    filled = fill("timm:resnet18.a1_in1k")
    assert (filled["channels"], filled["size"], filled["crop_fraction"]) == (3, 224, 0.95)
    assert filled["interpolation"] == "bicubic" and filled["mean"] == [0.485, 0.456, 0.406]
    assert filled["classes"] == fill(RESNET)["classes"]
    squeezed = fill("timm:convnext_base.fb_in22k_ft_in1k_384")
    assert squeezed["crop_fraction"] is None and squeezed["size"] == 384
    many = fill("timm:convnext_tiny.fb_in22k")["classes"]
    assert len(many) == 21841 == len(set(many)) and "crane (n02012849)" in many
    for metadata in ("timm:vit_base_patch16_clip_224.openai", "timm:vit_small_patch14_dinov2.lvd142m"):
        with pytest.raises(UserError, match=r"teacher.metadata: .* states no class names; give teacher.classes"):
            fill(metadata)
        assert fill(metadata, classes=["a", "b"])["classes"] == ["a", "b"]


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ("ResNet18_Weights.IMAGENET1K_V1", r"got 'ResNet18_Weights.IMAGENET1K_V1'; torchvision:<weights>, such as"),
        ("torchvision:ResNet18_Weights", r"torchvision has no weights ResNet18_Weights; did you mean ResNet"),
        ("torchvision:ResNet18_Weights.IMAGENET1K_V9", r"did you mean ResNet18_Weights.IMAGENET1K_V1"),
        ("torchvision:DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1", r"are not the weights of an image class"),
        ("timm:resnet18.a1_in2k", r"timm has no weights resnet18.a1_in2k; did you mean .*resnet18.a1_in1k"),
        ("timm:vit_base_patch16_sapiens2.fb", r"takes images of 1024x768, and teacher.size is one number"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(metadata: str, line: str) -> None:
    if metadata.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=rf"^teacher.metadata: .*{line}"):
        fill(metadata)


def test_packages_are_asked_only_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models", None)
    complete = {"metadata": "timm:resnet18.a1_in1k", **dict.fromkeys(FIELDS)}
    assert fill_teacher(complete) is complete
    with pytest.raises(UserError, match=r"timm:resnet18.a1_in1k needs timm; pip install 'diffdfkd\[timm\]'"):
        fill("timm:resnet18.a1_in1k")


def test_a_recipe_takes_its_teacher_from_metadata(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    teacher = {"architecture": "torchvision:resnet18", "metadata": RESNET, "weights": "./resnet18.pth"}
    path.write_text(yaml.safe_dump({"prior": "./prior", "teacher": teacher, "student": {"architecture": "resnet18"}}))
    recipe = load_recipe(path, ["teacher.size=96", "synthesis.images_per_class=2"])
    assert recipe.teacher.size == 96 and recipe.teacher.crop_fraction == 0.875 and len(recipe.teacher.classes) == 1000


def test_names_that_occur_twice_are_told_apart() -> None:
    assert distinct(["crane", "tench", "crane"]) == ["crane (0)", "tench", "crane (2)"]
    assert distinct(["crane", "tench", "crane"], ["n1", "n2", "n3"]) == ["crane (n1)", "tench", "crane (n3)"]
    assert distinct(["a", "a"], ["x", "x"]) == ["a (0)", "a (1)"]
    assert distinct(["a", "b"]) == ["a", "b"]
