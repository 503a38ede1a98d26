"""The corpus of bad inputs: what a user types or writes wrongly. Files that are bad are in `bad_file_cases`.

A case makes its input bad and says what the one line of the error holds. To add one is to add a row.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]
Arguments = list[str]
Spoil = Callable[[Path, Recipe], Arguments]
Call = Callable[[Arguments], tuple[int, str, str]]
"""The fixture ``command_line``."""


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    spoil: Spoil
    """Of an empty folder and a good recipe, which it may change: the arguments of the command line."""
    begins: str
    """How the line begins after ``error: ``: the field or file at fault. ``{folder}`` stands for the folder."""
    holds: tuple[str, ...]
    """What else the line holds: what was given, what is allowed, the cure."""
    mended: bool = False
    """Whether the test then gives the good recipe the same output folder, which must take it."""
    environment: tuple[tuple[str, str], ...] = ()


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of all files in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_run(run: Path, folder: Path) -> Path:
    """A copy of a run's folder, to be damaged, that says it was made there."""
    shutil.copytree(run, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(run), str(folder)))
    return folder


def write(folder: Path, recipe: Recipe) -> str:
    """File of the recipe."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def command(folder: Path, recipe: Recipe, *overrides: str, name: str = "run") -> Arguments:
    """A command on the recipe as it now is; its output is ``folder/run``."""
    return [name, write(folder, recipe), f"output={folder / 'run'}", *overrides]


def given(*overrides: str, name: str = "run") -> Spoil:
    """The overrides on a good recipe; ``{folder}`` stands for the folder."""
    return lambda folder, recipe: command(folder, recipe, *(_in(folder, text) for text in overrides), name=name)


def typed(*arguments: str) -> Spoil:
    """A command line as it stands; ``{folder}`` stands for the folder."""
    return lambda folder, recipe: [_in(folder, argument) for argument in arguments]


def _in(folder: Path, text: str) -> str:
    return text.replace("{folder}", str(folder))


def text(content: str | bytes) -> Spoil:
    """A recipe file of this content."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        path = folder / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["run", str(path), f"output={folder / 'run'}"]

    return spoil


def field(override: str, begins: str, *holds: str, mended: bool = False) -> Case:
    """An override that the recipe refuses."""
    return Case(override, given(override), begins, holds, mended)


def without(*path: str) -> Spoil:
    """The recipe without a field that it must have."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        node = recipe
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        return command(folder, recipe)

    return spoil


def folder_as_recipe(folder: Path, recipe: Recipe) -> Arguments:
    (folder / "mine.yaml").mkdir()
    return ["run", str(folder / "mine.yaml")]


def run_as_recipe(folder: Path, recipe: Recipe) -> Arguments:
    (folder / "mine").mkdir()
    write(folder / "mine", recipe)
    return ["run", str(folder / "mine")]


EXECUTES = "student: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]\n"


def python_in_yaml(folder: Path, recipe: Recipe) -> Arguments:
    return text(EXECUTES.format(folder / "executed"))(folder, recipe)


TYPED = [
    Case("no recipe", typed("run"), "Missing argument 'RECIPE'", ("diffdfkd --help",)),
    Case("no command of this name", typed("rum", "fashion"), "No such command 'rum'", ("diffdfkd --help",)),
    Case("no option of this name", typed("run", "fashion", "--dry"), "No such option", ("--dry-run",)),
    Case("option without its value", typed("evaluate", "fashion", "--student"), "Option '--student'", ("argument",)),
    Case("no student", typed("evaluate", "fashion"), "Missing option '--student'", ("diffdfkd --help",)),
    Case("recipe's name", typed("run", "fashon"), "fashon: no recipe of this name", ("fashion",)),
    Case(
        "no recipe of this file",
        typed("run", "{folder}/a.yaml"),
        "{folder}/a.yaml: no such recipe file",
        ("or the name",),
    ),
    Case("folder as recipe", folder_as_recipe, "{folder}/mine.yaml: a folder", ("give a .yaml file",)),
    Case("folder of a run as recipe", run_as_recipe, "{folder}/mine: a folder", ("give {folder}/mine/recipe.yaml",)),
    Case("override without =", given("seed"), "seed: an override is key=value", ("synthesis.steps=20",)),
    Case("override without a key", given("=5"), "=5: an override is key=value", ("synthesis.steps=20",)),
    Case("override with a gap", given("synthesis..steps=5"), "synthesis..steps=5: ", ("key=value",)),
    Case(
        "override below a value", given("device.x=5"), "device.x=5: device is a value, not a section", ("give device=",)
    ),
]

YAML = [
    Case("no YAML", text("prior: ["), "{folder}/recipe.yaml: not a YAML file", ("line 1",)),
    Case("tabs", text("prior: a\nteacher:\n\tsize: 28\n"), "{folder}/recipe.yaml: ", ("line 3", "spaces")),
    Case("bytes", text(b"\x93\x00\xff"), "{folder}/recipe.yaml: not a YAML file", ()),
    Case("list", text("- prior\n- teacher\n"), "{folder}/recipe.yaml: a recipe is a mapping of fields", ("list",)),
    Case("nothing", text("# later\n"), "{folder}/recipe.yaml: a recipe is a mapping of fields", ("empty",)),
    Case("key twice", text("seed: 1\nprior: a\nseed: 2\n"), "{folder}/recipe.yaml: seed", ("line 3", "line 1", "one")),
    Case(
        "key twice in a section",
        text("prior: a\nteacher:\n  size: 28\n  channels: 1\n  size: 32\n"),
        "{folder}/recipe.yaml: size",
        ("line 5", "line 3", "one"),
    ),
    Case("python in YAML", python_in_yaml, "{folder}/recipe.yaml: not a YAML file", ("python/object/apply",)),
    Case("deep", text("seed: " + "[" * 1000), "{folder}/recipe.yaml: not a YAML file", ("nested",)),
    Case("alias of itself", text("prior: &a [*a]\n"), "{folder}/recipe.yaml: ", ("itself",)),
    Case("number as key", text("1: 2\n"), "{folder}/recipe.yaml: 1: ", ("a field's name is text",)),
    Case("no prior", without("prior"), "prior: missing", ("give prior=",)),
    Case("no architecture", without("teacher", "architecture"), "teacher.architecture: missing", ("add it",)),
]

NUMBERS = [
    field("synthesis.images_per_class=0", "synthesis.images_per_class: got 0", "greater than or equal to 1"),
    field("synthesis.images_per_class=-5", "synthesis.images_per_class: got -5", "greater than or equal to 1"),
    field("synthesis.images_per_class=1e12", "synthesis.images_per_class: got 1", "integer"),
    field("synthesis.images_per_class=1000000000000000", "synthesis.images_per_class: 4,000", "at most 100,000"),
    field("synthesis.batch_size=0", "synthesis.batch_size: got 0", "greater than or equal to 1"),
    field("synthesis.batches_per_shard=-1", "synthesis.batches_per_shard: got -1", "greater than or equal to 1"),
    field("synthesis.steps=0", "synthesis.steps: got 0", "greater than or equal to 1"),
    field("synthesis.steps=2.5", "synthesis.steps: got 2.5", "integer"),
    field("synthesis.steps='20'", 'synthesis.steps: got "20"', "integer"),
    field("synthesis.steps=yes", "synthesis.steps: got true", "give its value"),
    field("synthesis.steps=1001", "synthesis.steps: got 1001", "1000"),
    field("synthesis.guidance_scale=-1", "synthesis.guidance_scale: got -1", "greater than or equal to 0"),
    field("synthesis.size=4", "synthesis.size: got 4", "greater than or equal to 8"),
    field("synthesis.quality=0", "synthesis.quality: got 0", "greater than or equal to 1"),
    field("guidance.rho=.nan", "guidance.rho: got NaN", "finite"),
    field("guidance.class_weight=.nan", "guidance.class_weight: got NaN", "finite"),
    field("guidance.batchnorm_weight=-0.1", "guidance.batchnorm_weight: got -0.1", "greater than or equal to 0"),
    field("guidance.adversarial_weight=.inf", "guidance.adversarial_weight: got Infinity", "finite"),
    field("guidance.window=[0.8,0.2]", "guidance.window: got [0.8, 0.2]", "start must lie before the end"),
    field("guidance.window=[0,1.5]", "guidance.window.1: got 1.5", "less than or equal to 1"),
    field("guidance.window=[-0.1,1]", "guidance.window.0: got -0.1", "greater than or equal to 0"),
    field("guidance.window=[0.5]", "guidance.window", "[0.0, 0.8]"),
    field("guidance.window=[0.1,0.2]", "guidance.window: [0.1, 0.2] holds none of the 3 steps", "widen it"),
    field("guidance.every=0", "guidance.every: got 0", "greater than or equal to 1"),
    field("cutmix.every=-1", "cutmix.every: got -1", "greater than or equal to 0"),
    field("cutmix={every: 99, partner: any}", "cutmix.every: got 99", "set it to 2 or less"),
    field(
        "cutmix={every: 1, partner: any, repair: masked, band: 0}", "cutmix.band: got 0", "greater than or equal to 1"
    ),
    field("synthesis.fan_out=0", "synthesis.fan_out: got 0", "greater than or equal to 1"),
    field("synthesis.fan_out=3", "synthesis.fan_out: got 3", "give synthesis.images_per_class=3"),
    field("synthesis={fan_out: 2, fork: 1.0}", "synthesis.fork: got 1.0 of synthesis.steps=", "one after it"),
    field("cutmix.probability=2", "cutmix.probability: got 2", "less than or equal to 1"),
    field("cutmix.alpha=0", "cutmix.alpha: got 0", "greater than 0"),
    field("rounds=0", "rounds: got 0", "greater than or equal to 1"),
    field("rounds=100000", "rounds: got 100000", "at most one round per image"),
    field("distillation.steps=-1", "distillation.steps: got -1", "greater than or equal to 1"),
    field("distillation.batch_size=0", "distillation.batch_size: got 0", "greater than or equal to 1"),
    field("distillation.learning_rate=.nan", "distillation.learning_rate: got NaN", "finite"),
    field("distillation.temperature=0", "distillation.temperature: got 0", "greater than 0"),
    field("distillation.milestones=[0.5,2]", "distillation.milestones.1: got 2", "less than or equal to 1"),
    field("distillation.warmup_steps=4", "distillation.warmup_steps: got 4", "leave steps after it"),
    field("distillation.holdout=8", "distillation.holdout: got 8 of 8 images", "leave some to train on"),
    field("distillation.zero_stage=7", "distillation.zero_stage: got 7", "0, 1, 2 or 3"),
    field("evaluation.batch_size=0", "evaluation.batch_size: got 0", "greater than or equal to 1"),
    field("seed=-1", "seed: got -1", "greater than or equal to 0"),
    field("seed=1e400", "seed: got ", "integer"),
    field("kernel=fast", 'kernel: got "fast"', "'auto', 'triton' or 'reference'"),
    field("threads=0", "threads: got 0", "greater than or equal to 1"),
    field("threads=1000000", "threads: got 1000000", "less than or equal to"),
    field("teacher.size=1", "teacher.size: got 1", "greater than or equal to 8"),
    field("teacher.channels=2", "teacher.channels: got 2", "1 or 3"),
    field("teacher.std=[0]", "teacher.std.0: got 0", "greater than 0"),
    field("teacher.mean=[.nan]", "teacher.mean: got [nan]", "finite"),
    field(
        "synthesis.words=[Bag, T-shirt top, Coat, Shoe]",
        "synthesis.words: Bag at place 0 would be drawn for the class T-shirt/top",
        "is the name of the class at place 1, and so for 1 more",
    ),
    field("teacher.mean=[127.5]", "teacher.mean: got [127.5]", "divide mean and std by 255"),
    field("teacher.std=[58.4]", "teacher.std: got [58.4]", "divide mean and std by 255"),
    field("synthesis.guidance_scale=1e38", "synthesis.guidance_scale: got ", "less than or equal to 1000"),
    field("teacher.mean=[0.1,0.2]", "teacher.mean: got 2 numbers for 1 channel", "give 1 or one each"),
    field("teacher.crop_fraction=1.5", "teacher.crop_fraction: got 1.5", "less than or equal to 1"),
]

CHOICES = [
    field("synthesys.steps=3", "synthesys: unknown field", "did you mean synthesis"),
    field("synthesis.stepz=3", "synthesis.stepz: unknown field", "did you mean steps"),
    field("synthesis=5", "synthesis: got 5", "this is a section", "synthesis.images_per_class="),
    field("synthesis.sampler=dimm", 'synthesis.sampler: got "dimm"', "'ddim'", "'euler'"),
    field("synthesis.format=gif", 'synthesis.format: got "gif"', "'png' or 'webp'"),
    field("synthesis.words=[a]", "synthesis.words: got 1 words for 4 classes", "give one each"),
    field('synthesis.prompt=["a {}", "a photo"]', "synthesis.prompt: templates without a place for the class", "{}"),
    field(
        "synthesis={prompt: a photo, words: [a, [b, c], d, e]}",
        "synthesis.words: several words a class, but templates without a place for the class",
        "put {} into synthesis.prompt",
    ),
    field("guidance.mode=soft", 'guidance.mode: got "soft"', "'clean'", "'exact'", mended=True),
    field("guidance.rho_rule=big", 'guidance.rho_rule: got "big"', "'unit'"),
    field("guidance.rho=0", "guidance.rho: got 0", "guidance.mode=none"),
    field("guidance={class_weight: 0, batchnorm_weight: 0}", "guidance: all weights are 0", "guidance.mode=none"),
    field("guidance.adversarial_weight=1", "guidance.adversarial_weight: got 1", "set rounds to 2"),
    field("guidance.class_window=[0.9,0.2]", "guidance.class_window: got", "start must lie before the end"),
    field("guidance.batchnorm_window=[0.4,0.6]", "guidance.batchnorm_window: [0.4, 0.6] holds none", "widen it"),
    field("guidance={window: [0.6, 1], class_window: [0, 0.6]}", "guidance.class_window: [0.0, 0.6] holds none", "3"),
    field("guidance.rho_schedule=up", 'guidance.rho_schedule: got "up"', "'rising'"),
    field("guidance.layers=[]", "guidance.layers: got []", "a list of names or patterns"),
    field("guidance.layers=first", 'guidance.layers: got "first"', "'all'"),
    field("guidance.layer_weights=[1,0]", "guidance.layer_weights: got [1, 0]", "greater than 0"),
    field("guidance.statistics=image", 'guidance.statistics: got "image"', "'class'"),
    field("guidance={statistics: class, batchnorm_weight: 0}", "guidance.statistics: class, but", "take batch"),
    field("guidance.micro_batch=0", "guidance.micro_batch: got 0", "greater than or equal to 1"),
    field("guidance.micro_batch=4", "guidance.micro_batch: got 4", "raise synthesis.batch_size"),
    field("guidance={micro_batch: 2, mode: exact}", "guidance.micro_batch: got 2", "mode clean alone"),
    field("guidance={micro_batch: 2, mode: reuse}", "guidance.micro_batch: got 2", "mode clean alone"),
    field("cutmix={every: 1, probability: 0}", "cutmix.probability: got 0", "set cutmix.every=0"),
    field(
        "synthesis={sampler: euler, steps: 3, images_per_class: 2, batch_size: 4, fan_out: 2}",
        "cutmix.partner: within finds no partner",
        "cutmix.partner=across or any",
    ),
    Case(
        "seams of another sampler",
        given("synthesis.sampler=euler", "cutmix={every: 1, partner: any, repair: masked}"),
        "cutmix.repair: masked knows the noise levels of ddim alone",
        ("synthesis.sampler=ddim",),
    ),
    field("distillation.augmentation=[flop]", 'distillation.augmentation.0: got "flop"', "'flip'"),
    field("distillation.optimizer=adam", 'distillation.optimizer: got "adam"', "'adamw'"),
    field("distillation.dtype=float16", 'distillation.dtype: got "float16"', "'bfloat16'"),
    field("distillation.deepspeed.fp17={}", "distillation.deepspeed.fp17: DeepSpeed has no such key", "did you mean"),
    field("distillation.deepspeed.train_batch_size=3", "distillation.deepspeed.train_batch_size", "set that instead"),
    field("prior.dtype=int8", 'prior.dtype: got "int8"', "'bfloat16'"),
    field("device=gpu", 'device: got "gpu"', "'cuda'"),
    field("output=null", "output: got null", "string"),
    field("teacher.classes=null", "teacher.classes: got null", "list"),
    field("teacher.classes=[a]", "teacher.classes: got 1 class name", "two or more"),
    field("teacher.classes=[a,b,c,a]", "teacher.classes: two classes have the same name", "make them distinct"),
    field("teacher.classes=[1,2,3,4]", "teacher.classes.0: got 1", "string"),
    field("teacher.interpolation=lanczos", 'teacher.interpolation: got "lanczos"', "'bicubic'"),
    field("teacher.channel_order=grb", 'teacher.channel_order: got "grb"', "'bgr'"),
    field("evaluation={labels: a}", "evaluation.labels: given without evaluation.images", "give both"),
]

CASES = [*TYPED, *YAML, *NUMBERS, *CHOICES]
