"""TensorRT-RTX's plans of whole stages, built for GPUs that are not here, by the path that `diffdfkd build` takes.

The stages of the demo, with its own teacher, and of a tiny Stable Diffusion 1. What a plan computes is compared where
there is a GPU (test_tensorrt_on_gpu.py); what its graph computes, here.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_stages import classifier, open_prior, prior_stage

from diffdfkd.engine.backends.build import PLAN, Settings, exported, prepare
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.serve import Subject
from diffdfkd.engine.classifier import build_classifier
from diffdfkd.engine.engine_stages import Batches, Stage
from diffdfkd.engine.parity import TOLERANCES
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.engines import subject_of

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime, which compares the graph, is not installed")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STAGES = ("unet", "chain", "vjp")
BATCHES = {"static": Batches(2), "ranged": Batches(2, 1, 4)}
Make = Callable[[str, Batches, torch.dtype], Stage]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(EngineCache(tmp_path_factory.mktemp("plans") / "cache"), threads=1, capabilities=("SM86",))


@pytest.fixture(scope="module")
def demo() -> Make:
    recipe = load_recipe("fashion")
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").eval().requires_grad_(False)
    subject = subject_of(recipe, load_prior(recipe.prior, "cpu"), teacher)

    def make(name: str, batches: Batches, precision: torch.dtype) -> Stage:
        return Subject(recipe, subject.prior, teacher, subject.context, batches=batches).make(name)(precision)

    return make


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> Make:
    prior, teacher = open_prior(tiny_sd1), classifier(3)
    return lambda name, batches, precision: prior_stage(name, prior, batches, precision, teacher=teacher)


@pytest.fixture
def make(request: pytest.FixtureRequest, model: str) -> Make:
    return request.getfixturevalue(model)


PLANS = itertools.product(("demo", "sd1"), STAGES, ("static", "ranged"), (F16, F32))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name", "kind", "precision"), PLANS, ids=str)
def test_plan(make: Make, settings: Settings, name: str, kind: str, precision: torch.dtype) -> None:
    stage, entry = prepare(lambda dtype: make(name, BATCHES[kind], dtype), "tensorrt-rtx", precision, settings)
    assert entry.made and entry.files.keys() == {PLAN, "builder.log"}
    graph = exported(stage, settings)
    assert not graph.made
    check_graph(stage, graph.details["parity"])
    # The weights are in it.
    size = entry.path(PLAN).stat().st_size
    assert size == entry.details["bytes"] > 0.8 * graph.details["weights_bytes"] > 50_000

    sidecar = json.loads((entry.folder / "engine.json").read_text())
    identity, details = sidecar["identity"], sidecar["details"]
    assert identity["specification"] == stage.specification.describe()
    assert identity["specification"]["name"] == name
    assert identity["specification"]["batches"] == ([2, 2, 2] if kind == "static" else [1, 2, 4])
    assert identity["capabilities"] == details["capabilities"] == ["SM86"]
    assert identity["precision"] == details["precision"] == str(precision).removeprefix("torch.")
    assert details["runs_on"] == f"GPUs of compute capability 8.6, under tensorrt-rtx {rtx.__version__}"
    # It could not run here.
    assert details["parity"] is None

    _, again = prepare(lambda dtype: make(name, BATCHES[kind], dtype), "tensorrt-rtx", precision, settings)
    assert not again.made and (again.folder, again.files) == (entry.folder, entry.files)


def check_graph(stage: Stage, parity: dict[str, Any]) -> None:
    """What ONNX Runtime computes from the file that the plan is made of is what eager does."""
    tolerance = TOLERANCES[stage.precision]
    least, usual, most = stage.specification.range
    assert parity["fault"] is None
    assert parity["rows"] == ([2, 1] if stage.specification.static else [least, usual, most])
    # A few losses may come to the same bits; a whole gradient or prediction from another program does not.
    assert 0 <= parity["relative"] < tolerance.values
    if stage.gradients:
        assert 0 < parity["gradient"] < tolerance.gradients and parity["cosine"] > tolerance.cosine
    else:
        assert parity["relative"] > 0 and parity["gradient"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [("demo", "vjp"), ("sd1", "chain")])
def test_plan_of_a_gradient_in_bfloat16(make: Make, settings: Settings, name: str) -> None:
    """Of which TensorRT has no transposed convolutions, as the gradients of strided ones are."""
    stage, entry = prepare(lambda dtype: make(name, Batches(2), dtype), "tensorrt-rtx", BF16, settings)
    assert entry.made and entry.details["precision"] == "bfloat16"
    graph = exported(stage, settings).details
    assert entry.details["bytes"] > 0.8 * graph["weights_bytes"] > 100_000
