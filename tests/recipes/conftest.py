"""A whole run in seconds: the tiny prior, a random teacher of four classes, random test images."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

CLASSES = ["T-shirt/top", "Bag", "Coat", "<b>Shoe</b>"]


def write_idx(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    """IDX files of images uint8 [n,h,w] and labels [n]; returns the images file."""
    path = folder / "test-images-idx3-ubyte"
    path.write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.to(torch.uint8).numpy().tobytes())
    content = struct.pack(">II", 0x801, len(labels)) + labels.to(torch.uint8).numpy().tobytes()
    (folder / "test-labels-idx1-ubyte").write_bytes(content)
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_prior: Path) -> Path:
    """YAML file of a recipe with two rounds, CutMix and all losses; its output is to be given."""
    from diffdfkd.engine.architectures import ARCHITECTURES
    from diffdfkd.engine.classifier import Classifier, Preprocessing
    from diffdfkd.engine.weights import save_classifier

    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(1)
    model = ARCHITECTURES["small_cnn"](channels=1, classes=len(CLASSES), width=4)
    # Away from the initial statistics, so that the BatchNorm loss has something to say.
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features) * 0.1
    teacher = Classifier(model, Preprocessing(1, 28, (0.3,), (0.35,), "bilinear"), CLASSES)
    save_classifier(teacher, folder / "teacher.safetensors", {})
    labels = torch.arange(32) % len(CLASSES)
    images = write_idx(folder, torch.randint(0, 256, (32, 28, 28)), labels)
    recipe: dict[str, Any] = {
        "prior": str(tiny_prior),
        "teacher": {
            "architecture": "small_cnn",
            "options": {"width": 4},
            "weights": "./teacher.safetensors",
            "classes": CLASSES,
            "channels": 1,
            "size": 28,
            "mean": [0.3],
            "std": [0.35],
        },
        "student": {"architecture": "small_cnn", "options": {"width": 2}},
        "synthesis": {"images_per_class": 8, "batch_size": 4, "steps": 3},
        "guidance": {"batchnorm_weight": 0.3, "adversarial_weight": 0.5},
        "cutmix": {"every": 2, "partner": "any"},
        "rounds": 2,
        "distillation": {"steps": 100, "batch_size": 8, "checkpoint_every": 25, "augmentation": ["flip", "crop"]},
        "evaluation": {"images": str(images)},
        "device": "cpu",
        "threads": 1,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and result of an undisturbed run of `tiny_recipe`. Shared: do not write into it."""
    from diffdfkd.engine.recipe import load_recipe
    from diffdfkd.recipes.run import run

    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(load_recipe(tiny_recipe, [f"output={folder}"]), progress=False)


@pytest.fixture(scope="session")
def good_recipe(tiny_recipe: Path) -> dict[str, Any]:
    """A recipe of one round that takes a second, its paths absolute. Shared: do not change it."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["teacher"]["weights"] = str(tiny_recipe.parent / "teacher.safetensors")
    del recipe["cutmix"]
    return recipe | {
        "synthesis": {"images_per_class": 2, "batch_size": 4, "steps": 3},
        "guidance": {"batchnorm_weight": 0.3},
        "rounds": 1,
        "distillation": {"steps": 4, "batch_size": 8},
    }


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory, good_recipe: dict[str, Any]) -> Path:
    """Folder of a finished run of `good_recipe`. Shared: do not write into it."""
    from diffdfkd.engine.recipe import load_recipe
    from diffdfkd.recipes.run import run

    folder = tmp_path_factory.mktemp("good") / "run"
    run(load_recipe(good_recipe, [f"output={folder}"]), progress=False)
    return folder


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str, str]]:
    """The command line in this process: exit code, standard output and standard error."""
    from diffdfkd.recipes import cli

    def call(arguments: list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main(arguments)
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def made() -> Callable[[Path], dict[str, bytes]]:
    """What a run made that must not depend on interruptions: bytes of all shards, sidecars and students."""

    def read(folder: Path) -> dict[str, bytes]:
        patterns = ("synthetic/**/*.tar", "synthetic/**/*.json", "synthetic/manifest.jsonl", "student/*.safetensors")
        patterns += ("student/student.onnx",)
        paths = [path for pattern in patterns for path in folder.glob(pattern)]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}

    return read
