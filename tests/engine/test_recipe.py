"""Recipes: what they accept, what they refuse, and in which words."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffdfkd.engine.combinations import round_samples
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.plan import synthesis_choices
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe

MINIMAL: dict[str, Any] = {
    "prior": "prior",
    "teacher": {"architecture": "small_cnn", "weights": "t.safetensors", "classes": ["a", "b"]},
    "student": {"architecture": "small_cnn"},
}

# Override, and what the message must hold: the field's path first, what was given, what is allowed.
BAD = [
    ("synthesis.stepz=3", ["synthesis.stepz: unknown field", "steps"]),
    ("guidanse.mode=none", ["guidanse: unknown field", "guidance"]),
    ("guidance.mode=soft", ["guidance.mode: got", "soft", "'clean'"]),
    ("guidance.rho_rule=unity", ["guidance.rho_rule", "unity", "'unit'"]),
    ("guidance.rho=-1", ["guidance.rho", "-1", "greater than or equal to 0"]),
    ("guidance.rho=.nan", ["guidance.rho", "finite"]),
    ("guidance.class_weight=.nan", ["guidance.class_weight", "finite"]),
    ("guidance.window=[0.8,0.2]", ["guidance.window", "[0.8, 0.2]", "start must lie before the end"]),
    ("guidance.window=[0,1.5]", ["guidance.window.1", "1.5", "less than or equal to 1"]),
    ("guidance.window=0.5", ["guidance.window", "0.5"]),
    ("guidance.every=0", ["guidance.every", "got 0"]),
    ("synthesis.sampler=pndm", ["synthesis.sampler", "pndm", "'ddim'", "'dpmsolver++'"]),
    ("synthesis.steps=0", ["synthesis.steps", "got 0", "greater than or equal to 1"]),
    ("synthesis.steps=2.5", ["synthesis.steps", "2.5", "integer"]),
    ("synthesis.batch_size=many", ["synthesis.batch_size", "many", "integer"]),
    ("synthesis.images_per_class=-5", ["synthesis.images_per_class", "-5"]),
    ("synthesis.images_per_class=true", ["synthesis.images_per_class", "true", "not a switch"]),
    ("synthesis.format=jpeg", ["synthesis.format", "jpeg", "'png'"]),
    ("synthesis.words=[one]", ["synthesis.words", "1 words for 2 classes"]),
    ("synthesis.guidance_scale=.inf", ["synthesis.guidance_scale", "finite"]),
    ("teacher.classes=[a]", ["teacher.classes", "two or more"]),
    ("teacher.classes=[a,no]", ["teacher.classes.1", "false", "into quotes"]),
    ("synthesis.prompt=an icon of a {name}", ["synthesis.prompt", "{name}", "{}"]),
    ("taecher.size=3", ["taecher: unknown field", "teacher"]),
    ("teacher.classes=[a,' ']", ["teacher.classes.1", "pattern"]),
    ("teacher.crop_fraction=0.001", ["teacher.crop_fraction", "0.001", "0.1"]),
    ("teacher.classes=[a,a]", ["teacher.classes", "same name"]),
    ("teacher.channels=2", ["teacher.channels", "got 2", "1 or 3"]),
    ("teacher.mean=[0.1,0.2]", ["teacher.mean", "2 numbers for 3 channel"]),
    ("teacher.std=[0]", ["teacher.std.0", "greater than 0"]),
    ("student.architecture=null", ["student.architecture", "null"]),
    ("cutmix.every=13", ["cutmix.every", "13", "synthesis.steps=12"]),
    ("cutmix.every=12", ["cutmix.every", "12", "11 or less"]),
    ("cutmix.alpha=0", ["cutmix.alpha", "greater than 0"]),
    ("cutmix.partner=self", ["cutmix.partner", "self", "'within'"]),
    ("rounds=0", ["rounds", "got 0"]),
    ("rounds=100000", ["rounds", "100000"]),
    ("guidance.adversarial_weight=1", ["guidance.adversarial_weight", "rounds=1", "2 or more"]),
    ("distillation.steps=0", ["distillation.steps", "got 0"]),
    ("distillation.optimizer=lion", ["distillation.optimizer", "lion", "'adamw'"]),
    ("distillation.zero_stage=4", ["distillation.zero_stage", "got 4"]),
    ("distillation.augmentation=[flop]", ["distillation.augmentation.0", "flop", "'flip'"]),
    (
        "distillation.deepspeed.zero_optimization.stage=2",
        ["distillation.deepspeed.zero_optimization.stage", "zero_stage"],
    ),
    ("distillation.deepspeed.train_batch_size=64", ["distillation.deepspeed.train_batch_size", "64", "batch_size"]),
    ("distillation.deepspeed.train_micro_batch_size_per_gpu=64", ["distillation.deepspeed.train_micro", "batch_size"]),
    ("distillation.deepspeed.bf16={enabled: true}", ["distillation.deepspeed.bf16", "distillation.dtype decides"]),
    ("distillation.deepspeed.zero_optimization=2", ["distillation.deepspeed.zero_optimization", "mapping"]),
    ("distillation.holdout=400", ["distillation.holdout", "400 of 400"]),
    ("synthesis.quality=80", ["synthesis.quality", "80", "format=png", "webp"]),
    (
        "distillation={teacher_logits: cached, augmentation: [flip, mixup]}",
        ["distillation.teacher_logits", "mixup", "auto or computed"],
    ),
    ("evaluation.labels=x", ["evaluation.labels", "without evaluation.images"]),
    ("seed=-1", ["seed", "-1"]),
    ("seed=x", ["seed", "integer"]),
    ("seed=", ["seed", "null", "integer"]),
    ("device=tpu", ["device", "tpu", "'cpu'"]),
    ("threads=0", ["threads", "got 0"]),
    ("synthesis.steps='20'", ["synthesis.steps", '"20"', "integer"]),
    ("synthesis.steps=20.5", ["synthesis.steps", "20.5", "integer"]),
    ("guidance.rho='0.2'", ["guidance.rho", '"0.2"', "number"]),
    ("teacher.channels=true", ["teacher.channels", "true", "not a switch"]),
    ("distillation.deepspeed.gradient_cliping=1", ["distillation.deepspeed.gradient_cliping", "gradient_clipping?"]),
    ("distillation.deepspeed.managed_gradient_accumulation=true", ["distillation.deepspeed.managed", "batch_size"]),
    ("guidance.window=[false,true]", ["guidance.window.0", "false", "number"]),
    ("teacher.mean=[true]", ["teacher.mean.0", "true", "number"]),
    ("guidance.window=[0.95,0.99]", ["guidance.window", "none of the 12 steps"]),
    ("guidance.rho=0", ["guidance.rho", "guidance.mode=none"]),
    ("distillation.warmup_steps=1500", ["distillation.warmup_steps", "1500"]),
    ("evaluation=null", ["evaluation", "null"]),
    ("steps", ["steps: an override is key=value"]),
    ("=3", ["an override is key=value"]),
    ("seed.x=3", ["seed.x=3", "seed is a value"]),
]


@pytest.mark.parametrize(("override", "words"), BAD, ids=[override for override, _ in BAD])
def test_bad_override_is_one_line_that_names_the_field(override: str, words: list[str]) -> None:
    source = {**MINIMAL, "seed": 0} if override.startswith("seed.") else MINIMAL
    with pytest.raises(UserError) as error:
        load_recipe(source, [override])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(words[0].split(":")[0].split(" ")[0]) or override.startswith("=")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["guidance.rho_rule=cfg", "synthesis.guidance_scale=1"], "guidance.rho_rule"),
        (["guidance.class_weight=0", "guidance.batchnorm_weight=0"], "guidance"),
        (
            ["guidance.class_weight=0", "guidance.batchnorm_weight=0", "guidance.adversarial_weight=1", "rounds=2"],
            "guidance",
        ),
        (["cutmix.every=2", "synthesis.batch_size=1"], "cutmix.every"),
        (["rounds=20", "distillation.steps=10"], "rounds"),
        (["rounds=4", "distillation.holdout=150"], "distillation.holdout"),
        (["cutmix.every=2", "cutmix.probability=0"], "cutmix.probability"),
        (["evaluation.images=x", "evaluation=null"], "evaluation"),
    ],
)
def test_impossible_combination(overrides: list[str], field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        load_recipe(MINIMAL, overrides)


@pytest.mark.parametrize(
    ("classes", "batch", "per_class", "rounds"), itertools.product((2, 4, 6), range(2, 9), (1, 2, 3), (1, 2))
)
def test_cutmix_within_is_refused_exactly_where_no_batch_can_hold_a_class_twice(
    classes: int, batch: int, per_class: int, rounds: int
) -> None:
    overrides = ["cutmix.every=2", f"synthesis.batch_size={batch}", f"synthesis.images_per_class={per_class}"]
    source = {**MINIMAL, "teacher": {**MINIMAL["teacher"], "classes": [str(i) for i in range(classes)]}}
    asked = load_recipe(source, [*overrides, f"rounds={rounds}", "cutmix.partner=any"])
    sizes = [round_samples(asked, round) for round in range(rounds)]
    batches = [range(first, min(first + batch, size)) for size in sizes for first in range(0, size, batch)]
    # Any order of the classes in a block is possible: two blocks in one batch may share a class.
    possible = any(batch[0] // classes != batch[-1] // classes for batch in batches)
    if possible:
        load_recipe(source, [*overrides, f"rounds={rounds}"])
    else:
        with pytest.raises(UserError, match=r"^cutmix\.partner: within finds no partner.*; raise synthesis\."):
            load_recipe(source, [*overrides, f"rounds={rounds}"])


def test_guidance_off_needs_no_weights() -> None:
    recipe = load_recipe(MINIMAL, ["guidance.mode=none", "guidance.class_weight=0", "guidance.batchnorm_weight=0"])
    assert recipe.guidance.mode == "none"


def test_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"^teacher.classes: missing"):
        load_recipe({**MINIMAL, "teacher": {"architecture": "small_cnn"}})


def test_override_values() -> None:
    recipe = load_recipe(
        MINIMAL,
        [
            "guidance.window=[0,0.8]",
            "distillation.learning_rate=1e-3",
            "teacher.weights=null",
            "output=2024",
            "prior.dtype=bfloat16",
            "synthesis.prompt=a photo: {}",
            "student.options.width=16",
            "distillation.deepspeed.gradient_clipping=true",
        ],
    )
    assert recipe.guidance.window == (0.0, 0.8)
    assert recipe.distillation.learning_rate == 1e-3
    assert recipe.teacher.weights is None
    assert recipe.output == "2024"
    assert (recipe.prior.path, recipe.prior.dtype) == ("prior", "bfloat16")
    assert recipe.synthesis.prompt == "a photo: {}"
    assert recipe.student.options == {"width": 16}
    assert recipe.distillation.deepspeed == {"gradient_clipping": True}


def test_other_test_images_leave_the_labels_of_the_recipe_behind() -> None:
    given = {**MINIMAL, "evaluation": {"images": "i.gz", "labels": "l.gz"}}
    for text, images in (("real", "real"), ("null", None)):
        evaluation = load_recipe(given, [f"evaluation.images={text}"]).evaluation
        assert (evaluation.images, evaluation.labels) == (images, None)
    assert load_recipe(given, ["evaluation.images=j.gz", "evaluation.labels=m.gz"]).evaluation.labels == "m.gz"
    assert load_recipe(given, ["evaluation.batch_size=7"]).evaluation.labels == "l.gz"


def test_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe({**MINIMAL, "prior": "~/prior"}, ["output=~/runs/a"])
    assert recipe.output == "/home/someone/runs/a"


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    content = {**MINIMAL, "prior": "./mine", "evaluation": {"images": "../test"}, "output": "runs/x"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.prior.path == str(tmp_path / "mine")
    assert recipe.evaluation.images == str(tmp_path.parent / "test")
    assert (recipe.teacher.weights, recipe.output) == ("t.safetensors", "runs/x")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words", "\x00"])
def test_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml: ") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^fashon: no recipe of this name; there are fashion"):
        load_recipe("fashon")


def test_packaged_recipe_is_valid() -> None:
    recipe = load_recipe("fashion")
    assert len(recipe.teacher.classes) == 10
    assert Path(recipe.teacher.weights or "").is_absolute()


def test_dump_loads_to_the_same_recipe() -> None:
    recipe = load_recipe(MINIMAL, ["rounds=2", "guidance.adversarial_weight=1", "threads=3"])
    assert load_recipe(dump_recipe(recipe)) == recipe
    assert isinstance(recipe, Recipe)


def test_nothing_heavy_is_imported() -> None:
    """A mistake in a recipe must cost a fraction of a second, and no device is probed."""
    heavy = ("torch", "deepspeed", "tensorrt", "diffusers", "transformers", "numpy")
    code = f"import sys, diffdfkd.engine.recipe; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_overrides_of_prompt_and_prior_are_taken_as_written() -> None:
    assert load_recipe(MINIMAL, ["synthesis.prompt="]).synthesis.prompt == ""
    assert load_recipe(MINIMAL, ["synthesis.prompt=null {}"]).synthesis.prompt == "null {}"
    prior = load_recipe(MINIMAL, ["prior={path: some/where, dtype: bfloat16}"]).prior
    assert (prior.path, prior.dtype) == ("some/where", "bfloat16")


def test_exponents_are_numbers_in_files_and_within_overrides(tmp_path: Path) -> None:
    content = {**MINIMAL, "distillation": {"learning_rate": 0.5}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content).replace("0.5", "2e-3"))
    assert load_recipe(file).distillation.learning_rate == 2e-3
    recipe = load_recipe(file, ["distillation={learning_rate: 1e-3}", "teacher.std=[5E-1]", "guidance.rho=.2e0"])
    assert (recipe.distillation.learning_rate, recipe.teacher.std, recipe.guidance.rho) == (1e-3, [0.5], 0.2)
    assert load_recipe(file, ["teacher.classes=['1e3', 12e, e5]"]).teacher.classes == ["1e3", "12e", "e5"]


def test_whole_numbers_serve_where_a_fraction_is_meant() -> None:
    recipe = load_recipe(MINIMAL, ["guidance.window=[0,1]", "guidance.class_weight=1", "teacher.std=[1]"])
    assert (recipe.guidance.window, recipe.guidance.class_weight, recipe.teacher.std) == ((0.0, 1.0), 1.0, [1.0])


def test_a_digest_that_begins_like_a_number_stays_text() -> None:
    from diffdfkd.engine.recipe_yaml import parse_yaml

    assert parse_yaml("digest: 33e40acd77b7\nrate: 1e-3\n", "a.yaml") == {"digest": "33e40acd77b7", "rate": 0.001}


def test_cheap_fields_enter_the_choices_where_they_differ_alone() -> None:
    def choices(*overrides: str, decoder: str | None = None) -> dict[str, Any]:
        return synthesis_choices(load_recipe(MINIMAL, overrides), "prior", "teacher", None, decoder)

    usual = choices()
    assert not {"guidance.decoder", "guidance.decoder_window", "synthesis.reuse_every"} & usual.keys()
    assert "synthesis.guidance_interval" not in usual
    interval = choices("synthesis.guidance_interval=[0,0.5]")
    assert interval == {**usual, "synthesis.guidance_interval": [0.0, 0.5]}
    assert choices("synthesis.reuse_every=2") == {**usual, "synthesis.reuse_every": 2}
    light = choices("guidance.decoder=a.safetensors", "guidance.decoder_window=[0,0.5]", decoder="digest")
    assert light == {**usual, "guidance.decoder": "digest", "guidance.decoder_window": [0.0, 0.5]}
