"""The published settings: each recipe is complete and pinned, and runs as shipped against stand-ins of the same format.

Stand-ins lie where the recipe expects the real things: the prior in the hub library's cache under its id and commit,
the teacher and the data set in the working folder. Overrides only make a run small.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from data_sets import write_cifar10, write_cifar100, write_domainnet, write_tiny_imagenet

from diffdfkd.engine.classifier import build_model
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.engine.recipe_file import CONFIGS
from diffdfkd.recipes import cli
from diffdfkd.recipes.dry_run import dry_run
from diffdfkd.recipes.run import run

PUBLISHED = sorted(path.stem for path in CONFIGS.glob("*_sd15*.yaml"))
CLASSES = {
    "cifar10_sd15": 10,
    "cifar10_sd15_lcm": 10,
    "cifar100_sd15": 100,
    "domainnet_sd15": 10,
    "tiny_imagenet_sd15": 200,
}
SMALL = {
    "prior.dtype": "float32",
    "synthesis.images_per_class": 1,
    "synthesis.steps": 2,
    "cutmix.every": 1,
    "guidance.window": "[0,0.5]",  # for 200 classes alone
    "distillation.steps": 2,
    "distillation.batch_size": 4,
    "device": "cpu",
    "threads": 1,
}
"""What makes a run small, and the arithmetic of a CPU."""
ENGINES = {"engine.unet": "onnxruntime", "engine.chain": "onnxruntime", "engine.precision": "float32"}
"""In the place of TensorRT's."""


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_these_are_all_that_ship() -> None:
    assert set(PUBLISHED) == set(CLASSES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_all_that_a_person_should_know(name: str) -> None:
    recipe = load_recipe(name)
    assert len(set(recipe.teacher.classes)) == len(recipe.teacher.classes) == CLASSES[name]
    about = recipe.about.model_dump()
    assert [field for field, text in about.items() if not text] == []
    assert "Modelled, not measured" in str(recipe.about.time) and "never run here" in str(recipe.about.summary)
    head = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert head[0] == f"# diffdfkd run {name}" and head[1].startswith(f"# diffdfkd run {name} --dry-run ")
    # A branch moves: whatever comes from the hub is pinned.
    for source in (recipe.prior, *recipe.prior.loras):
        assert re.fullmatch(r"[0-9a-f]{40}", str(source.revision))
    assert recipe.output == f"runs/{name}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_modelled_hours_follow_from_the_plan(name: str) -> None:
    recipe = load_recipe(name)
    synthesis = recipe.synthesis
    halves = 2 if synthesis.guidance_scale != 1 else 1
    unet = 0.80 * halves * (3 if recipe.guidance.mode == "exact" else 1)  # two calls and a backward pass, or one call
    tera = synthesis.steps * (unet + 5.1) + 2.5
    hours = tera * synthesis.images_per_class * CLASSES[name] / 800 / 3600
    text = str(recipe.about.time)
    assert f"= {tera:.0f} TFLOP" in text
    claimed = re.search(r"images take ([\d.]+) (h|minutes)", text)
    assert claimed is not None
    assert float(claimed[1]) / (60 if claimed[2] == "minutes" else 1) == pytest.approx(hours, rel=0.03)
    assert f"{synthesis.images_per_class * CLASSES[name]:,} images" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_variants_in_the_head_are_recipes(name: str) -> None:
    head = (CONFIGS / f"{name}.yaml").read_text().partition("\nprior:")[0].replace("\\\n#", "")
    commands = re.findall(rf"^#   diffdfkd run {name} (.*)$", head, re.MULTILINE)
    assert commands or name in ("cifar10_sd15_lcm", "tiny_imagenet_sd15")
    for overrides in commands:
        recipe = load_recipe(name, overrides.split())
        assert recipe.output != f"runs/{name}"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty hub cache that is not to be left."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return work


@pytest.mark.parametrize("name", PUBLISHED)
def test_on_a_machine_without_anything_the_dry_run_says_what_to_fetch(
    name: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["run", name, "--dry-run"])
    assert leaving.value.code == 3
    out = capsys.readouterr().out
    recipe = load_recipe(name)
    assert f"hf download {recipe.prior.path} --revision {recipe.prior.revision} --include" in out
    for lora in recipe.prior.loras:
        assert f'hf download {lora.path} --revision {lora.revision} --include "{lora.file}"' in out
    assert "\nMISSING " in out and "teacher.weights" in out.rpartition("\nMISSING ")[2]
    assert list(empty_folder.iterdir()) == []


def place_prior(recipe: Recipe, prior: Path, lora: Path) -> None:
    """The stand-ins in the hub library's cache, under the ids and commits of the recipe."""
    hub = Path(huggingface_hub.constants.HF_HUB_CACHE)
    for source in (recipe.prior, *recipe.prior.loras):
        snapshot = hub / f"models--{source.path.replace('/', '--')}" / "snapshots" / str(source.revision)
        if source is recipe.prior:
            shutil.copytree(prior, snapshot)
        else:
            snapshot.mkdir(parents=True)
            shutil.copyfile(lora, snapshot / str(source.file))


def place_teacher(recipe: Recipe) -> None:
    """Random weights of the architecture, as training scripts leave them: DataParallel, in a wrapper, pickled."""
    teacher = recipe.teacher
    torch.manual_seed(0)
    model = build_model(teacher.architecture, {}, teacher.channels, len(teacher.classes), field="teacher")
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    path = Path(str(teacher.weights))
    path.parent.mkdir()
    torch.save({"state_dict": weights, "epoch": 200, "best_acc1": 95.7}, path)


def place_images(recipe: Recipe) -> int:
    """A test image a class, unpacked as the data set is; returns their number."""
    classes, size = recipe.teacher.classes, recipe.teacher.size
    generator = torch.Generator().manual_seed(1)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)

    name, labels = str(recipe.evaluation.images), torch.arange(len(classes))
    if name == "data/cifar-10-batches-py":
        write_cifar10(Path("data"), images(10), labels)
    elif name == "data/cifar-100-python":
        write_cifar100(Path("data"), images(100), labels, classes)
    elif name == "data/tiny-imagenet-200":
        wnids = [f"n{number:08d}" for number in range(len(classes))]
        # As in words.txt: several names of a thing, the common one first.
        write_tiny_imagenet(Path("data"), images(200), labels, wnids, [f"{word}, Genus species" for word in classes])
    else:
        # Of the 345 classes these, numbered otherwise than the teacher's.
        names = sorted({*classes, "aircraft_carrier", "alarm_clock", "zigzag"})
        write_domainnet(Path("data/domainnet"), images(len(names)), torch.arange(len(names)), names, Path(name).name)
        choose = re.search(r"grep .*", str(recipe.about.images))
        assert choose is not None
        subprocess.run(choose[0], shell=True, check=True)
    return len(classes)


def small(recipe: Recipe) -> list[str]:
    """Overrides that make a run of the recipe small."""
    fields = dict(SMALL)
    if not recipe.cutmix.every:
        del fields["cutmix.every"]
    if len(recipe.teacher.classes) < 200:
        del fields["guidance.window"]
    if recipe.engine.unet != "auto":
        fields |= ENGINES
    return [f"{key}={value}" for key, value in fields.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, "throughput_cifar10"])
def test_it_runs_as_shipped_from_synthesis_to_report(
    name: str, empty_folder: Path, tiny_sd1: Path, tiny_lcm_lora: Path
) -> None:
    shipped = load_recipe(name)
    place_prior(shipped, tiny_sd1, tiny_lcm_lora)
    place_teacher(shipped)
    tested = place_images(shipped)
    recipe = load_recipe(name, small(shipped))
    before, after = flat(dump_recipe(shipped)), flat(dump_recipe(recipe))
    assert {field for field in after if after[field] != before[field]} <= {*SMALL, *ENGINES}

    text, complete = dry_run(recipe)
    assert complete, text
    result = run(recipe, progress=False)
    assert (result["images"], result["test_images"]) == (len(shipped.teacher.classes), tested)
    assert result["dropped"] == 0
    assert 0 <= result["student_accuracy"] <= 1 and 0 <= result["teacher_accuracy"] <= 1
    folder = empty_folder / "runs" / name
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert recipe.prior.path in page
    assert (folder / "student" / "student.safetensors").is_file()


@pytest.mark.slow
def test_it_runs_from_a_folder_of_the_sd_2_family_too(empty_folder: Path, tiny_sd2: Path) -> None:
    shipped = load_recipe("cifar10_sd15")
    place_teacher(shipped)
    place_images(shipped)
    overrides = [*small(shipped), f"prior.path={tiny_sd2}", "prior.revision=null"]
    assert run(load_recipe("cifar10_sd15", overrides), progress=False)["images"] == 10
