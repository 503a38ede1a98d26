"""The corpus of bad inputs, continued: LoRAs, weights' metadata, whole programs, unpacked data sets, other commands."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from bad_input_cases import Arguments, Case, Recipe, Spoil, command, given, typed
from bad_prior_cases import Hostile


def lora(make: Callable[[Path], Path | str], entry: str = "{{path: {}}}") -> Spoil:
    """A run with one LoRA, made in the folder."""
    return lambda folder, recipe: command(folder, recipe, f"prior.loras=[{entry.format(make(folder))}]")


def no_lora(folder: Path) -> Path:
    """Weights that update nothing."""
    safetensors.torch.save_file({"features.0.weight": torch.zeros(2, 2)}, folder / "style.safetensors")
    return folder / "style.safetensors"


def of_another_prior(folder: Path) -> Path:
    """An update of a layer that the prior does not have."""
    name = "lora_unet_down_blocks_7_attentions_0_proj_in"
    state = {f"{name}.lora_down.weight": torch.zeros(2, 16), f"{name}.lora_up.weight": torch.zeros(16, 2)}
    safetensors.torch.save_file(state, folder / "style.safetensors")
    return folder / "style.safetensors"


def cut_lora(folder: Path) -> Path:
    file = no_lora(folder)
    file.write_bytes(file.read_bytes()[:-9])
    return file


def pickled_lora(folder: Path) -> Path:
    torch.save({"weight": Hostile(folder / "executed")}, folder / "style.pt")
    return folder / "style.pt"


def two_loras(folder: Path) -> Path:
    (folder / "styles").mkdir()
    shutil.copyfile(no_lora(folder), folder / "styles" / "a.safetensors")
    shutil.copyfile(no_lora(folder), folder / "styles" / "b.safetensors")
    return folder / "styles"


LORAS = [
    Case("no LoRA there", lora(lambda _: "/nowhere.safetensors"), "prior.loras.0.path: /nowhere.safetensors: ", ()),
    Case(
        "LoRA of a hub without commit", lora(lambda _: "someone/style"), "prior.loras.0.revision: ", ("40 hexadecimal",)
    ),
    Case(
        "weights that are no LoRA",
        lora(no_lora),
        "prior.loras.0.path: {folder}/style.safetensors: no LoRA",
        ("features.0",),
    ),
    Case(
        "LoRA of another prior",
        lora(of_another_prior),
        "prior.loras.0.path: {folder}/style.safetensors",
        ("down_blocks",),
    ),
    Case("LoRA cut", lora(cut_lora), "{folder}/style.safetensors: cut short", ("again",)),
    Case(
        "LoRA as pickle",
        lora(pickled_lora),
        "prior.loras.0.path: {folder}/style.pt",
        (".safetensors alone", "convert it"),
    ),
    Case("two LoRAs in a folder", lora(two_loras), "prior.loras.0.path: {folder}/styles", ("prior.loras.0.file",)),
    Case(
        "LoRA out of its folder",
        lora(two_loras, "{{path: {}, file: ../style.safetensors}}"),
        "prior.loras.0.file: ",
        ("inside",),
    ),
    Case("LoRA of no size", lora(no_lora, "{{path: {}, scale: .nan}}"), "prior.loras.0.scale: got NaN", ("finite",)),
    Case("LoRA as text", given("prior.loras=style"), "prior.loras: got ", ("list",)),
]

METADATA = [
    Case("metadata of nobody", given("teacher.metadata=resnet18"), "teacher.metadata: got ", ("torchvision:", "timm:")),
    Case(
        "metadata that torchvision lacks",
        given("teacher.metadata=torchvision:ResNet18_Weights.IMAGENET1K_V9"),
        "teacher.metadata: torchvision has no weights",
        ("ResNet18_Weights.IMAGENET1K_V1",),
    ),
    Case(
        "metadata of no classifier",
        given("teacher.metadata=torchvision:FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"),
        "teacher.metadata: ",
        ("image classifier",),
    ),
]


def program(kind: str, make: Callable[[Path], object], *overrides: str) -> Spoil:
    """A run with a whole program as teacher."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        make(folder / "program")
        recipe["teacher"] |= {"architecture": kind, "options": {}, "weights": str(folder / "program")}
        return command(folder, recipe, *overrides)

    return spoil


def traced(file: Path) -> None:
    layers = [torch.nn.Conv2d(1, 2, 28), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(2, 4)]
    torch.jit.trace(torch.nn.Sequential(*layers).eval(), torch.zeros(2, 1, 28, 28)).save(str(file))


def hostile(file: Path) -> None:
    file.write_bytes(pickle.dumps(Hostile(file.parent / "executed")))


PROGRAMS = [
    Case(
        "program that cannot be tapped",
        program("torchscript", traced),
        "guidance.batchnorm_weight: ",
        ("got 0.3, but teacher.architecture is torchscript", "set it to 0"),
    ),
    Case(
        "program of other classes",
        program("torchscript", traced, "teacher.classes=[a,b,c]", "guidance.batchnorm_weight=0"),
        "teacher.",
        ("3 classes",),
    ),
    Case(
        "pickle as program",
        program("torchscript", hostile, "guidance.batchnorm_weight=0"),
        "teacher.weights: {folder}/program",
        ("TorchScript",),
    ),
    Case(
        "pickle as exported program",
        program("exported", hostile, "guidance.batchnorm_weight=0"),
        "teacher.weights: {folder}/program",
        ("torch.export",),
    ),
    Case(
        "program as student",
        given("student.architecture=torchscript"),
        "student.architecture: torchscript is a whole program",
        ("name a network",),
    ),
]


def cifar(batch: Callable[[Path], object]) -> Spoil:
    """A run with CIFAR-10 as it is unpacked, one of its files wrong."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        root = folder / "cifar-10-batches-py"
        root.mkdir()
        (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b", b"c", b"d"]}))
        batch(root / "test_batch")
        return command(folder, recipe, f"evaluation.images={root}")

    return spoil


def lines(text: str) -> Spoil:
    """A run with a list of images and labels."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        (folder / "real").mkdir()
        (folder / "list.txt").write_text(text)
        images = f"evaluation.images={folder / 'real'}"
        return command(folder, recipe, images, f"evaluation.labels={folder / 'list.txt'}")

    return spoil


DATA_SETS = [
    Case("CIFAR that runs code", cifar(hostile), "evaluation.images: {folder}/cifar-10-batches-py/test_batch", ()),
    Case(
        "CIFAR cut",
        cifar(lambda file: file.write_bytes(pickle.dumps({b"data": b"0" * 99, b"labels": [0]})[:-40])),
        "evaluation.images: {folder}/cifar-10-batches-py/test_batch",
        (),
    ),
    Case(
        "CIFAR without pixels",
        cifar(lambda file: file.write_bytes(pickle.dumps({b"labels": [0]}))),
        "evaluation.images: {folder}/cifar-10-batches-py/test_batch",
        ("unpack the data set again",),
    ),
    Case("list of no labels", lines("a.png\n"), "evaluation.labels: {folder}/list.txt: line 1", ("file label",)),
    Case("list of nothing", lines(""), "evaluation.labels: {folder}/list.txt: names no images", ()),
    Case("list that leads out", lines("../a.png 0\n"), "evaluation.labels: {folder}/list.txt: line 1", ("below",)),
    Case(
        "list of files that are not there",
        lines("a.png 0\n"),
        "evaluation.labels: {folder}/list.txt: a.png",
        ("not below",),
    ),
]

COMMANDS = [
    Case("recipe that nobody checks", typed("check", "fashon"), "fashon: no recipe of this name", ("fashion",)),
    Case(
        "recipe of a longer name", typed("run", "cifar10_sd16"), "cifar10_sd16: no recipe", ("cifar10_sd15", "cifar100")
    ),
    Case("check without a prior", given("prior=/nowhere", name="check"), "prior.path: /nowhere: no such folder", ()),
    Case(
        "check's figures below a file",
        given("--json", "{folder}/recipe.yaml/f.json", name="check"),
        "--json: {folder}/recipe.yaml/f.json cannot be written",
        ("another file",),
    ),
    Case("preview without weights", given("teacher.weights=/nowhere", name="preview"), "teacher.weights: /nowhere", ()),
    Case(
        "preview below a file",
        given("--to", "{folder}/recipe.yaml/new", name="preview"),
        "--to: {folder}/recipe.yaml/new cannot be written",
        ("another folder",),
    ),
    Case(
        "preview into the run", given("--to", "{folder}/run", name="preview"), "--to: {folder}/run", ("another folder",)
    ),
    Case("dry run of no field", given("synthesis.stepz=3", "--dry-run"), "synthesis.stepz: unknown field", ("steps",)),
    Case(
        "dry run of weights that do not fit",
        given("teacher.options.width=5", "--dry-run"),
        "teacher.weights: ",
        ("mis-shaped",),
    ),
    Case(
        "doctor's findings below a file",
        typed("doctor", "--json", "/dev/null/f.json"),
        "--json: /dev/null/f.json cannot be written",
        ("another file",),
    ),
    Case("size of no number", typed("convert", "a", "b", "--size", "big"), "Invalid value for '--size'", ("integer",)),
]

CASES = [*LORAS, *METADATA, *PROGRAMS, *DATA_SETS, *COMMANDS]
