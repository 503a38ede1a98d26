"""The corpus of bad inputs, continued: teachers and students, and the files of their weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from bad_input_cases import Arguments, Case, Recipe, Spoil, command, given
from bad_prior_cases import LFS_POINTER, Hostile, cut, tensors


def teacher(change: Callable[[Path], object], *overrides: str, suffix: str = ".safetensors") -> Spoil:
    """A run with a copy of the teacher's weights, changed."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        file = folder / f"teacher{suffix}"
        shutil.copyfile(recipe["teacher"]["weights"], file)
        recipe["teacher"]["weights"] = str(file)
        change(file)
        return command(folder, recipe, *overrides)

    return spoil


def state(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """A run with other tensors in the teacher's weights."""
    return teacher(lambda file: tensors(file.name, change)(file.parent))


def renamed(keys: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """With other names of the first keys."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for key in sorted(state)[:keys]:
            state["strange." + key] = state.pop(key)

    return change


def hostile(file: Path) -> None:
    torch.save({"weight": Hostile(file.parent / "executed")}, file)


def cut_archive(file: Path) -> None:
    """A state dict of which half has arrived."""
    torch.save({"weight": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])


def whole_network(file: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), file)


FACTORY = """
from torch import nn
def refusing(classes): raise ValueError("no such thing")
def number(classes): return 5
def broken(classes): raise RuntimeError("of my own")
def plain(classes, size=28): return nn.Sequential(nn.Conv2d(1, 2, size), nn.Flatten(), nn.Linear(2, classes))
def large(classes): return plain(classes, 64)
"""


def factory(name: str, *overrides: str) -> Spoil:
    """A run with a student of the user's own module, which lies in the working folder."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        (folder / "my_networks.py").write_text(FACTORY)
        return command(folder, recipe, f"student.architecture=my_networks:{name}", "student.options={}", *overrides)

    return spoil


def without_batchnorm(folder: Path, recipe: Recipe) -> Arguments:
    """A teacher that has no BatchNorm layer, with the BatchNorm loss on."""
    (folder / "my_networks.py").write_text(FACTORY)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 28), torch.nn.Flatten(), torch.nn.Linear(2, 4))
    safetensors.torch.save_file(network.state_dict(), folder / "plain.safetensors")
    recipe["teacher"] |= {
        "architecture": "my_networks:plain",
        "options": {},
        "weights": str(folder / "plain.safetensors"),
    }
    return command(folder, recipe)


CASES = [
    Case("no weights", given("teacher.weights=null"), "teacher.weights: missing", ("state dict",)),
    Case(
        "no weights there",
        given("teacher.weights=/nowhere"),
        "teacher.weights: /nowhere: no such file",
        ("state dict",),
    ),
    Case("folder as weights", given("teacher.weights={folder}"), "teacher.weights: {folder}: ", ("file",)),
    Case(
        "weights half fetched",
        teacher(lambda file: cut(file.name)(file.parent)),
        "teacher.weights: {folder}/teacher.safetensors",
        ("truncated",),
    ),
    Case(
        "weights as git-lfs pointer",
        teacher(lambda file: file.write_bytes(LFS_POINTER)),
        "teacher.weights: {folder}/teacher.safetensors",
        ("safetensors",),
    ),
    Case(
        "text as weights",
        teacher(lambda file: file.write_text("weights"), suffix=".pt"),
        "teacher.weights: {folder}/teacher.pt",
        ("safetensors",),
    ),
    Case(
        "nothing as weights",
        teacher(lambda file: file.write_bytes(b""), suffix=".pth"),
        "teacher.weights: {folder}/teacher.pth is empty",
        ("copy or download it again",),
    ),
    Case(
        "torch's file cut",
        teacher(cut_archive, suffix=".pth"),
        "teacher.weights: {folder}/teacher.pth is cut short",
        ("copy or download it again",),
    ),
    Case(
        "name close to a package's",
        given("student.architecture=torchvison:resnet18"),
        "student.architecture: cannot import torchvison (did you mean torchvision?)",
        (),
    ),
    Case(
        "pickle that runs code",
        teacher(hostile, suffix=".pt"),
        "teacher.weights: {folder}/teacher.pt",
        ("not executed", "safetensors"),
        True,
    ),
    Case(
        "pickle of a whole network",
        teacher(whole_network, suffix=".pt"),
        "teacher.weights: {folder}/teacher.pt",
        ("state dict", "safetensors"),
    ),
    Case(
        "missing and unknown keys",
        state(renamed(6)),
        "teacher.weights: {folder}/teacher.safetensors",
        (" missing (", " unknown (strange.", ", ...)", "teacher.architecture"),
    ),
    Case(
        "unknown key",
        state(lambda state: state.update(extra=torch.zeros(1))),
        "teacher.weights: {folder}/teacher.safetensors",
        ("1 unknown (extra)",),
    ),
    Case("mis-shaped key", given("teacher.options.width=5"), "teacher.weights: ", ("mis-shaped", "teacher.options")),
    Case(
        "empty state dict",
        state(lambda state: state.clear()),
        "teacher.weights: {folder}/teacher.safetensors",
        ("missing",),
    ),
    Case(
        "weights not finite",
        state(lambda state: next(value for value in state.values() if value.is_floating_point()).fill_(float("inf"))),
        "teacher.weights: {folder}/teacher.safetensors",
        ("not finite", "again"),
    ),
    Case(
        "fewer class names",
        given("teacher.classes=[a,b,c]"),
        "teacher.weights: ",
        ("4 classes", "has 3", "teacher.classes"),
    ),
    Case(
        "more class names",
        given("teacher.classes=[a,b,c,d,e]"),
        "teacher.weights: ",
        ("4 classes", "has 5", "teacher.classes"),
    ),
    Case("weights of another channel", given("teacher.channels=3"), "teacher.weights: ", ("mis-shaped",)),
    Case(
        "no architecture of this name",
        given("teacher.architecture=small_cmm"),
        "teacher.architecture: no architecture small_cmm",
        ("small_cnn",),
    ),
    Case(
        "none in torchvision",
        given("student.architecture=torchvision:resnet19"),
        "student.architecture: torchvision",
        ("resnet18",),
    ),
    Case("none in timm", given("student.architecture=timm:resnet19x"), "student.architecture: timm", ("did you mean",)),
    Case(
        "nothing but a colon",
        given("student.architecture=':'"),
        "student.architecture: : names no function",
        ("package.module:factory",),
    ),
    Case(
        "module by way of folders",
        given("student.architecture=..up:make"),
        "student.architecture: ..up:make names no",
        ("package.module:factory",),
    ),
    Case(
        "network beyond all memory",
        given("student.options.width=10000000"),
        "student.architecture: the student does not fit into memory",
        ("smaller student.options",),
    ),
    Case(
        "no module",
        given("student.architecture=no.module:make"),
        "student.architecture: cannot import no.module",
        ("install it",),
    ),
    Case(
        "no factory in the module", factory("nothing"), "student.architecture: my_networks has no function nothing", ()
    ),
    Case("factory that refuses", factory("refusing"), "student.options: ", ("no such thing",)),
    Case(
        "factory that fails",
        factory("broken"),
        "student.architecture: my_networks:broken",
        ("RuntimeError: of my own",),
    ),
    Case("factory of no network", factory("number"), "student.architecture: ", ("int", "torch.nn.Module")),
    Case("option that is none", given("student.options.depth=3"), "student.options.depth: unknown option", ("width",)),
    Case("option of another type", given("student.options.width=wide"), "student.options", ("wide",)),
    Case(
        "student's weights of another network",
        given("student.options.width=4", "student.weights={folder}/../s.safetensors"),
        "student.weights: ",
        (),
    ),
    Case(
        "student wider than the teacher whose weights it is to begin with",
        given("student.initialization=teacher", "student.options.width=5"),
        "student.initialization: teacher, but ",
        ("no counterpart", "features.0.0.weight", "student.initialization=random"),
    ),
    Case(
        "student that would be its teacher's copy",
        given("student.initialization=teacher", "student.options.width=4"),
        "student.initialization: teacher, but the student is as wide and as deep as the teacher",
        ("take a narrower or shallower network", "student.initialization=random"),
    ),
    Case(
        "student that is to begin twice",
        given("student.initialization=teacher", "student.weights={folder}/../s.safetensors"),
        "student.initialization: teacher, but student.weights names ",
        ("student.weights=null",),
    ),
    Case(
        "beginning that is none",
        given("student.initialization=pretrained"),
        "student.initialization: got ",
        ("random", "teacher"),
    ),
    Case("layer that is none", given("guidance.layers=[nine.*]"), "guidance.layers: 'nine.*' matches none", ("are ",)),
    Case(
        "too few weights of layers",
        given("guidance.layer_weights=[1,2]"),
        "guidance.layer_weights: got 2 numbers for ",
        ("one each",),
    ),
    Case("no BatchNorm to listen to", without_batchnorm, "guidance.batchnorm_weight: ", ("BatchNorm", "0")),
    Case(
        "class activation maps of a student without a map",
        factory("plain", "distillation.cam_weight=1"),
        "student.architecture: has maps of 0 resolution(s)",
        ("distillation.student_stages", "sarc_weight to 0"),
    ),
    Case(
        "stage that is no module",
        given("distillation.sarc_weight=1", "distillation.student_stages=[features.2,features.5,features.77]"),
        "distillation.student_stages: the network has no module features.77",
        ("features.7",),
    ),
    Case(
        "two stages",
        given("distillation.sarc_weight=1", "distillation.teacher_stages=[features.2,features.7]"),
        "distillation.teacher_stages: got",
        ("at least 3 items",),
    ),
    Case(
        "kept answers for class activation maps",
        given("distillation.cam_weight=1", "distillation.teacher_logits=cached"),
        "distillation.teacher_logits: cached, but distillation.cam_weight",
        ("auto or computed",),
    ),
    Case(
        "class activation maps of a program",
        given(
            *("distillation.sarc_weight=1", "teacher.architecture=torchscript", "teacher.options={}"),
            "guidance.batchnorm_weight=0",
        ),
        "distillation.sarc_weight: compares feature maps, but teacher.architecture is torchscript",
        ("package.module:factory",),
    ),
    Case(
        "class activation maps under ZeRO 3",
        given("distillation.cam_weight=1", "distillation.zero_stage=3"),
        "distillation.cam_weight: reads the student's classifier, which distillation.zero_stage=3",
        ("0, 1 or 2",),
    ),
    Case(
        "network for larger images",
        factory("large"),
        "student.architecture: fails on a 1x28x28 image",
        ("teacher.size",),
    ),
]
