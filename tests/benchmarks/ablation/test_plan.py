"""Which runs there are, and which of them learn from the same images."""

from typing import Any

import pytest

from diffdfkd.benchmarks.ablation.axis import Axis
from diffdfkd.benchmarks.ablation.plan import Run, plan_runs, plan_stores, shared_shards
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import load_recipe


def axis(variants: dict[str, Any], name: str = "x", **fields: Any) -> Axis:
    return Axis.model_validate({"name": name, "reference": next(iter(variants)), "variants": variants, **fields})


def runs_of(variants: dict[str, Any], seeds: int = 1, **fields: Any) -> list[Run]:
    return plan_runs("fashion", ["device=cpu", "threads=1"], [axis(variants, **fields)], seeds)


def test_runs_are_variants_by_budgets_by_seeds() -> None:
    grid = {"images": [100, 200], "steps": [10, 20, 30]}
    runs = runs_of({"a": [], "fresh": {"images": "floor"}, "real": {"images": "oracle"}}, 2, grid=grid)
    assert len(runs) == 2 * (6 + 3 + 6) and len({run.digest for run in runs}) == len(runs)
    assert [run.seed for run in runs] == [0] * 15 + [1] * 15
    assert {run.images for run in runs if run.variant == "real"} == {100, 200}
    assert {run.images for run in runs if run.variant == "fresh"} == {128 * steps for steps in (10, 20, 30)}


def test_later_choices_win() -> None:
    given = axis({"a": ["distillation.steps=3"], "b": []}, base=["distillation.steps=2"])
    runs = plan_runs("fashion", ["distillation.steps=1", "guidance.rho=0.5"], [given], 1)
    assert [run.recipe.distillation.steps for run in runs] == [3, 2]
    assert [run.recipe.guidance.rho for run in runs] == [0.5, 0.5]


def test_runs_that_differ_in_training_alone_share_images() -> None:
    variants = {
        "a": [],
        "longer": ["distillation.steps=4000", "student.options={width: 8}"],
        "unguided": ["guidance.mode=none"],
        "real": {"images": "oracle"},
    }
    runs = runs_of(variants, 2, grid={"images": [100, 300]})
    stores = plan_stores(runs)
    assert set(stores) == {run.digest for run in runs if run.source == "synthetic"}
    by_choice = {(run.variant, run.seed): stores[run.digest] for run in runs if run.source == "synthetic"}
    assert by_choice["a", 0] == by_choice["longer", 0]
    assert len({store.digest for store in by_choice.values()}) == 4, "guided and unguided, two seeds"
    assert {store.recipe.synthesis.images_per_class for store in stores.values()} == {30}


@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "threads=2", "guidance.rho=0.3", "synthesis.steps=8", "cutmix.every=2", "teacher.size=32"),
        *("prior.path=elsewhere", "teacher.weights=other.safetensors", "engine=onnxruntime", "rounds=2"),
    ],
)
def test_what_images_depend_on_is_not_shared(override: str) -> None:
    recipes = [load_recipe("fashion", ["device=cpu", *more]) for more in ([], [override])]
    stores = plan_stores([Run("x", "a", 0, "synthetic", recipe) for recipe in recipes])
    assert len({store.digest for store in stores.values()}) == 2


def test_rounds_share_only_with_the_same_number_of_images() -> None:
    rounds = ["rounds=3", "guidance.adversarial_weight=0.1"]
    runs = runs_of({"a": rounds, "longer": [*rounds, "distillation.steps=300"]}, grid={"images": [300, 600]})
    assert len({store.digest for store in plan_stores(runs).values()}) == 2


def test_only_shards_of_the_same_samples_are_shared() -> None:
    def recipe(images_per_class: int) -> Any:
        return load_recipe("fashion", [f"synthesis.images_per_class={images_per_class}"])

    assert shared_shards(recipe(100), recipe(30)) == [0, 1, 2]
    assert shared_shards(recipe(100), recipe(35)) == [0, 1, 2], "a batch that is not full has other statistics"
    assert shared_shards(recipe(35), recipe(35)) == [0, 1, 2, 3]


def test_refusals() -> None:
    with pytest.raises(UserError, match="--seeds: got 0"):
        runs_of({"a": []}, 0)
    with pytest.raises(UserError, match=r"--axis: x: variant b: guidance.strength: unknown field"):
        runs_of({"a": [], "b": ["guidance.strength=3"]})
    with pytest.raises(UserError, match=r"seed=3: an ablation has its own; give --seeds"):
        plan_runs("fashion", ["seed=3"], [axis({"a": []})], 1)
    with pytest.raises(UserError, match="--axis: x is given twice"):
        plan_runs("fashion", [], [axis({"a": []}), axis({"b": []})], 1)
    with pytest.raises(UserError, match=r"evaluation\.images: an ablation judges students on real images"):
        plan_runs("fashion", ["evaluation.images=null"], [axis({"a": []})], 1)
