"""Engines on a GPU: proven against eager, whole trajectories, images decoded beside the next batch."""

from pathlib import Path

import pytest
import torch

from diffdfkd.benchmarks.engines import subject_from
from diffdfkd.engine.backends.build import build
from diffdfkd.engine.backends.serve import Subject, run_settings
from diffdfkd.engine.backends.unet_attention import settle_attention
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.runner import NoEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH = 16


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    cache = tmp_path_factory.mktemp("cache")
    return subject_from("fashion", ["device=cuda", f"synthesis.batch_size={BATCH}", f"engine.cache={cache}"])


@pytest.mark.parametrize("stage", ["unet", "chain", "vjp", "decoder"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ["eager", "compiled", "onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_an_engine_computes_what_eager_does(subject: Subject, engine: str, precision: torch.dtype, stage: str) -> None:
    settings = run_settings(subject.recipe)
    if engine != "eager":
        pytest.importorskip({"compiled": "torch"}.get(engine, engine.replace("-", "_")))
    if engine == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA provider")
    built = build(subject.make(stage), engine, precision, settings)  # raises Refused
    assert built.parity is None or built.parity.fault is None
    again = build(subject.make(stage), engine, precision, settings)
    assert again.cached or (engine == "eager" and precision == torch.float32)


def paint(subject: Subject, **engine: str) -> torch.Tensor:
    recipe = subject.recipe
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})
    ids = torch.arange(BATCH)
    with Painter(recipe, Models(subject.prior, subject.teacher), 0) as painter:
        painting = painter.paint(ids, ids % 10)
    assert painting.alive.all()
    return painting.images.float()


def test_guided_images_of_compiled_engines_are_those_of_eager(subject: Subject) -> None:
    eager = paint(subject, unet="eager", chain="eager")
    compiled = paint(subject, unet="compiled", chain="compiled")
    # Guidance magnifies rounding: docs/kernels.md, "The same images?".
    assert (eager - compiled).abs().mean() < 12
    # A chain that steered elsewhere, or not at all, would be far off.
    unguided = paint(Subject(unguided_recipe(subject.recipe), subject.prior, subject.teacher, subject.context))
    assert (eager - unguided).abs().mean() > 3 * (eager - compiled).abs().mean()


def unguided_recipe(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"guidance": recipe.guidance.model_copy(update={"mode": "none"})})


def test_batches_decoded_beside_the_next_one_are_the_same(subject: Subject) -> None:
    recipe = subject.recipe
    with Painter(recipe, Models(subject.prior, subject.teacher), 0) as painter:
        ids = [torch.arange(BATCH) + BATCH * index for index in range(3)]
        finishes = [painter.begin(part, part % 10) for part in ids]  # all denoised before the first is decoded
        beside = [finish().images for finish in finishes]
        for part, images in zip(ids, beside, strict=True):
            assert torch.equal(painter.paint(part, part % 10).images, images)


def test_xformers_attention_works_or_says_why_not(subject: Subject) -> None:
    make = subject.make("unet")
    stage = make(torch.float32)
    inputs = stage.examples(4, 0)
    found = settle_attention("auto", "eager", subject.prior.unet, lambda: stage.function(*inputs))
    assert found in ("sdpa", "xformers")


def test_a_plan_does_not_run_where_it_was_not_built_for(subject: Subject, tmp_path: Path) -> None:
    recipe = load_recipe("fashion", ["engine=tensorrt-rtx", f"engine.cache={tmp_path}"])
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("SM90 is the one that TensorRT-RTX does not know")
    with pytest.raises(NoEngine, match="SM90"):
        build(subject.make("decoder"), "tensorrt-rtx", torch.float16, run_settings(recipe))
