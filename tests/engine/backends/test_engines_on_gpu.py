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
from diffdfkd.recipes.launch import settle_machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH = 16
STAGES = ("unet", "chain", "vjp", "decoder")
HALF = (torch.float16, torch.bfloat16)
CASES = [
    *((engine, stage, torch.float32) for engine in ("onnxruntime", "tensorrt", "tensorrt-rtx") for stage in STAGES),
    *((engine, stage, torch.float16) for engine in ("tensorrt", "tensorrt-rtx") for stage in STAGES),
    *(("eager", stage, precision) for stage in STAGES for precision in HALF),
    # Each takes up to a minute to compile.
    *(("compiled", stage, precision) for stage in ("unet", "chain") for precision in (torch.float32, torch.bfloat16)),
    *(("compiled", stage, torch.float16) for stage in ("vjp", "decoder")),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    # Of all processes of a parallel session, so that each engine is built once.
    cache = tmp_path_factory.getbasetemp().parent / "engines"
    return subject_from("fashion", ["device=cuda", f"synthesis.batch_size={BATCH}", f"engine.cache={cache}"])


@pytest.mark.parametrize(("engine", "stage", "precision"), CASES)
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


def paint(subject: Subject, batches: int = 1, **engine: str) -> torch.Tensor:
    """Images of the first batch, made again after others where more are asked for."""
    recipe = subject.recipe
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})
    ids = torch.arange(BATCH)
    with Painter(recipe, Models(subject.prior, subject.teacher), 0) as painter:
        for batch in reversed(range(batches)):
            painting = painter.paint(ids + BATCH * batch, ids % 10)
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


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["synthesis.sampler=dpmsolver++", "cutmix.every=3", "cutmix.partner=any"],
        ["synthesis.sampler=ddpm", "guidance.window=[0,0.5]"],
        ["synthesis.guidance_scale=2.0", "guidance.mode=none"],
    ],
)
def test_recorded_steps_are_those_that_were_recorded(subject: Subject, engine: str, settings: list[str]) -> None:
    fixed = ["device=cuda", f"synthesis.batch_size={BATCH}", f"engine.cache={subject.recipe.engine.cache}"]
    recipe = settle_machine(load_recipe("fashion", [*fixed, f"engine={engine}", *settings]))
    varied = Subject(recipe, subject.prior, subject.teacher, subject.context)
    launched, recorded = paint(varied, cuda_graph="never"), paint(varied, cuda_graph="auto", batches=3)
    assert torch.equal(launched, recorded)


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
