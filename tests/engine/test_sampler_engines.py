"""Whole guided trajectories on engines: the sampler writes into their buffers, and ends where eager ends."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from stand_in_stages import CLASSES, WEIGHTS, classifier, open_prior
from torch import Tensor
from tracing import distance

from diffdfkd.engine import painter as painter_module
from diffdfkd.engine.backends.build import Settings, build
from diffdfkd.engine.backends.cache import EngineCache
from diffdfkd.engine.backends.eager import EagerRunner
from diffdfkd.engine.backends.serve import EngineChain, EngineUNet, EngineVjp
from diffdfkd.engine.classifier import Classifier, build_classifier
from diffdfkd.engine.cutmix import plan_cutmix
from diffdfkd.engine.engine_stages import (
    Batches,
    Stage,
    chain_engine_stage,
    student_weights,
    unet_engine_stage,
    vjp_engine_stage,
)
from diffdfkd.engine.loop import Kind, Loop
from diffdfkd.engine.painter import Models, Painter
from diffdfkd.engine.prior import Prior, load_prior
from diffdfkd.engine.recipe import CutMixRecipe, GuidanceRecipe, load_recipe
from diffdfkd.engine.runner import Runner
from diffdfkd.engine.sampler import Trajectory, sample
from diffdfkd.engine.schedule import make_table
from diffdfkd.engine.stages import decode_stage, guidance_chain, unet_stage
from diffdfkd.engine.taps import BatchNormTaps
from diffdfkd.kernels.launch import Kernel
from diffdfkd.kernels.philox import philox_normal

F32 = torch.float32
STEPS = 4
ADVERSARIAL = WEIGHTS.model_copy(update={"adversarial_weight": 5.0})


class Plain(EagerRunner):
    """As an engine's outputs lie: in buffers of their own, dense in the order of their dimensions, written over."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        most = stage.specification.range[2]
        self.outputs = [torch.full(port.shape_at(most), 7).to(port.dtype) for port in stage.specification.outputs]

    def run(self, rows: int) -> tuple[Tensor, ...]:
        found = []
        for port, buffer, value in zip(self.specification.outputs, self.outputs, super().run(rows), strict=True):
            found.append(buffer[:rows] if port.batched else buffer)
            found[-1].copy_(value)
        return tuple(found)


class World(NamedTuple):
    """A prior with its teacher, and what runs on it."""

    prior: Prior
    teacher: Classifier
    student: Classifier

    @property
    def context(self) -> Tensor:
        return self.prior.embed([*CLASSES, ""])

    def stage(self, name: str, batch: int, doubled: bool, weights: GuidanceRecipe) -> Stage:
        rows = Batches(batch).rows(2 if doubled else 1)
        if name == "unet":
            return unet_engine_stage(self.prior, rows, self.context, F32)
        if name == "vjp":
            return vjp_engine_stage(self.prior, rows, self.context, F32)
        return chain_engine_stage(self.prior, self.teacher, weights, Batches(batch), F32, self.student)

    def run(
        self,
        guidance: GuidanceRecipe,
        *,
        samples: int,
        scale: float = 1.0,
        sampler: Any = "ddim",
        steps: int = STEPS,
        runners: dict[str, Runner] | None = None,
        kernel: Kernel = "reference",
    ) -> Trajectory:
        """A trajectory by the run's own stages, or by the runners."""
        ids = torch.arange(samples)
        table = make_table(sampler, self.prior.scheduler_config, steps)
        context = self.context[ids % len(CLASSES)]
        if scale != 1:
            context = torch.cat([self.context[-1:].expand_as(context), context])
        unet, vjp = unet_stage(self.prior), None
        if runners is None:
            taps = BatchNormTaps(self.teacher.model)
            student = self.student if guidance.adversarial_weight > 0 else None
            chain: Any = guidance_chain(
                decode_stage(self.prior), self.teacher, taps, guidance, student, kernel="reference"
            )
        else:
            taps = None
            unet: Any = EngineUNet(runners["unet"])
            vjp = EngineVjp(runners["vjp"]) if "vjp" in runners else None
            chain = EngineChain(runners["chain"], self.student)
        try:
            return sample(
                unet,
                table,
                context,
                scale=scale,
                noise=philox_normal(3, ids, 0, 0, self.prior.latent_shape),
                sample_ids=ids,
                seed=3,
                guidance=guidance,
                plan=plan_cutmix(
                    CutMixRecipe(every=2, partner="any", probability=0.9),
                    ids % len(CLASSES),
                    len(CLASSES),
                    steps,
                    self.prior.latent_shape[1:],
                    3,
                    ids,
                ),
                chain=chain,
                kernel=kernel,
                vjp=vjp,
            )
        finally:
            if taps is not None:
                taps.remove()

    def runners(
        self,
        guidance: GuidanceRecipe,
        batch: int,
        scale: float = 1.0,
        make: Callable[[Stage], Runner] = Plain,
    ) -> dict[str, Runner]:
        names = ["unet", "chain", *(["vjp"] if guidance.mode in ("exact", "reuse") else [])]
        return {name: make(self.stage(name, batch, scale != 1, guidance)) for name in names}


@pytest.fixture(scope="module")
def world(tiny_prior: Path) -> World:
    student = classifier()
    student.model.head.weight.mul_(0.3)
    return World(open_prior(tiny_prior), classifier(), student)


def agree(given: Trajectory, expected: Trajectory, tolerance: float = 1e-4) -> None:
    assert given.alive.all() and torch.equal(given.alive, expected.alive)
    assert torch.equal(given.targets, expected.targets) and torch.equal(given.frozen, expected.frozen)
    assert distance(given.latents, expected.latents) <= tolerance
    guided = expected.losses.isfinite().all(1)
    assert torch.equal(given.losses.isfinite().all(1), guided) and guided.any()
    assert distance(given.losses[guided], expected.losses[guided]) <= tolerance


def guide(mode: str = "clean", **fields: Any) -> GuidanceRecipe:
    return WEIGHTS.model_copy(update={"mode": mode, "rho": 0.2, **fields})


@pytest.mark.parametrize("mode", ["clean", "reuse", "exact"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_trajectory_ends_where_eager_ends(world: World, mode: str, scale: float) -> None:
    guidance = guide(mode)
    expected = world.run(guidance, samples=5, scale=scale)
    given = world.run(guidance, samples=5, scale=scale, runners=world.runners(guidance, 5, scale))
    agree(given, expected)
    unguided = world.run(guide(rho=1e-6), samples=5, scale=scale)
    assert distance(expected.latents, unguided.latents) > 0.05  # the gradient decides something


@pytest.mark.parametrize("mode", ["clean", "exact"])
def test_engine_is_told_the_weights_of_each_step(world: World, mode: str) -> None:
    """By one engine, made of a recipe without windows and with other weights."""
    runners = world.runners(guide(mode), 5)
    others = {"class_weight": 0.4, "batchnorm_weight": 2.0, "class_window": (0.0, 0.5), "batchnorm_window": (0.3, 1.0)}
    guidance = guide(mode, rho_schedule="rising", **others)
    expected = world.run(guidance, samples=5)
    agree(world.run(guidance, samples=5, runners=runners), expected)
    assert distance(expected.latents, world.run(guide(mode, **others), samples=5).latents) > 1e-3


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmsolver++", "lcm"])
def test_every_sampler(world: World, sampler: str) -> None:
    guidance = guide(window=(0.0, 0.5))
    expected = world.run(guidance, samples=3, scale=2.0, sampler=sampler)
    given = world.run(guidance, samples=3, scale=2.0, sampler=sampler, runners=world.runners(guidance, 3, 2.0))
    agree(given, expected)
    assert expected.losses.isnan().all(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("mode", ["clean", "exact"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_short_last_batch_of_a_static_engine(world: World, mode: str, scale: float) -> None:
    guidance = guide(mode)
    runners = world.runners(guidance, 5, scale)
    whole = world.run(guidance, samples=5, scale=scale, runners=runners)
    padded = world.run(guidance, samples=3, scale=scale, runners=runners)
    fitting = world.run(guidance, samples=3, scale=scale, runners=world.runners(guidance, 3, scale))
    agree(padded, fitting)
    agree(padded, world.run(guidance, samples=3, scale=scale))
    # And a whole one after it is what it was.
    again = world.run(guidance, samples=5, scale=scale, runners=runners)
    assert torch.equal(again.latents, whole.latents)


def test_batch_that_is_too_large_is_refused_with_the_cure(world: World) -> None:
    guidance = guide()
    with pytest.raises(ValueError, match=r"unet: a batch of 6 rows is more than .* 4; .*synthesis\.batch_size"):
        world.run(guidance, samples=3, scale=2.0, runners=world.runners(guidance, 2, 2.0))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_nothing_is_copied_into_the_unet(world: World, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = guide()
    calls: list[bool] = []
    real = Runner.__call__

    def watched(self: Runner, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.specification.name == "unet":
            own = self.inputs.values()
            calls.append(all(value.data_ptr() == buffer.data_ptr() for value, buffer in zip(inputs, own, strict=True)))
        if self.specification.name == "chain":
            assert all(
                value.data_ptr() == self.inputs[port.name].data_ptr()
                for value, port in zip(inputs[4:], self.specification.inputs[4:], strict=True)
            )
        return real(self, *inputs)

    monkeypatch.setattr(Runner, "__call__", watched)
    world.run(guidance, samples=3, scale=scale, runners=world.runners(guidance, 3, scale))
    assert calls == [True] * STEPS


def test_student_takes_part_and_is_handed_over_once(world: World) -> None:
    runners = world.runners(ADVERSARIAL, 4)
    expected = world.run(ADVERSARIAL, samples=4)
    agree(world.run(ADVERSARIAL, samples=4, runners=runners), expected)
    assert (expected.losses[:, 3] < 0).any()
    other = classifier()
    other.model.head.weight.mul_(0.7)
    softer = world._replace(student=other)
    agree(softer.run(ADVERSARIAL, samples=4, runners=runners), softer.run(ADVERSARIAL, samples=4))
    held = [runners["chain"].inputs[f"student_{index}"] for index in range(len(student_weights(other)))]
    assert all(torch.equal(*pair) for pair in zip(held, student_weights(other).values(), strict=True))


def test_a_sample_that_fails_leaves_the_others_alone(world: World) -> None:
    guidance = guide()
    runners = world.runners(guidance, 4)
    unet = runners["unet"]
    assert isinstance(unet, Plain)
    real, calls = unet.run, []

    def failing(rows: int) -> tuple[Tensor, ...]:
        (output,) = real(rows)
        calls.append(rows)
        if len(calls) == 2:
            output[1] = float("nan")
        return (output,)

    unet.run = failing  # type: ignore[method-assign]
    given = world.run(guidance, samples=4, runners=runners)
    # Its own, and whoever took a patch from it.
    assert not given.alive[1] and given.frozen.sum() >= 1
    assert given.latents[given.alive].isfinite().all() and given.losses.isfinite().all()


def test_kernels_read_and_write_an_engines_buffers(world: World) -> None:
    """Latents lie channels last, an engine's buffers do not: under Triton's interpreter."""
    guidance = guide()
    runners = world.runners(guidance, 2, 2.0)
    expected = world.run(guidance, samples=2, scale=2.0, steps=3)
    agree(world.run(guidance, samples=2, scale=2.0, steps=3, runners=runners, kernel="triton"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["clean", "exact", "reuse"])
def test_small_model_under_onnxruntime(world: World, mode: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = EngineCache(tmp_path_factory.getbasetemp() / "small-model-engines")  # shared by the modes
    settings = Settings(cache, threads=1)
    guidance = guide(mode)

    def make(stage: Stage) -> Runner:
        return build(lambda precision: stage, "onnxruntime", F32, settings).runner

    runners = world.runners(guidance, 4, 2.0, make)
    agree(world.run(guidance, samples=4, scale=2.0, runners=runners), world.run(guidance, samples=4, scale=2.0), 1e-3)
    agree(world.run(guidance, samples=3, scale=2.0, runners=runners), world.run(guidance, samples=3, scale=2.0), 1e-3)


BATCH = 8


class Demo:
    """The demonstration's networks, and batches of it with overrides of its recipe."""

    def __init__(self, cache: Path) -> None:
        self.fixed = [f"synthesis.batch_size={BATCH}", "device=cpu", "threads=1", f"engine.cache={cache}"]
        plain = load_recipe("fashion", self.fixed)
        assert plain.synthesis.steps == 12
        teacher = build_classifier(plain.teacher, plain.teacher, field="teacher").eval().requires_grad_(False)
        self.models = Models(load_prior(plain.prior, "cpu"), teacher)

    def painter(self, *overrides: str) -> Painter:
        return Painter(load_recipe("fashion", [*self.fixed, *overrides]), self.models, 0)

    def __call__(self, *overrides: str, samples: int = BATCH) -> Trajectory:
        ids = torch.arange(samples)
        with self.painter(*overrides) as painter:
            return painter._denoise(ids[None], ids % 10, ids % 10, True, True)[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("demo") / "cache")


def apart(given: Tensor, expected: Tensor) -> Tensor:
    """[B] |a - b| / |b| of each sample."""
    return (given - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [None, 0, 3, 6, 9, 11])
def test_demo_under_onnxruntime(demo: Demo, step: int | None) -> None:
    """Whole trajectories with one guided step, or none: what ends 1e-3 apart is no rounding."""
    overrides = ["guidance.mode=none"]
    if step is not None:
        overrides = [f"guidance.window=[{max(0, step / 12 - 0.01)},{step / 12 + 0.01}]"]
    # The last batch of a round is shorter than what the engine was built for.
    for samples in (BATCH, BATCH - 3):
        eager = demo("engine=eager", *overrides, samples=samples)
        engine = demo("engine=onnxruntime", *overrides, samples=samples)
        assert engine.alive.all()
        assert eager.losses.isfinite().all(1).nonzero().flatten().tolist() == ([] if step is None else [step])
        found = apart(engine.latents, eager.latents)
        # A sample may pass a kink even in one step; without guidance there is none.
        assert found.median() <= 1e-3 and found.max() <= (1e-3 if step is None else KINK), found


KINK = 5e-2
"""More than a step moves by where the input of one of the teacher's ReLUs changes its sign."""


@pytest.mark.slow
@pytest.mark.parametrize("samples", [BATCH, BATCH - 3])
def test_demo_step_by_step(demo: Demo, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """Guided steps, taken from eager's own latents, end where eager's do; a few of the twelve may pass a kink."""
    found = []
    plain = Loop.clean_step
    with demo.painter("engine=onnxruntime") as painter:
        denoiser = painter.denoiser

        def both(loop: Loop, kind: Kind, chain: Any, z: Tensor, before: Any, alive: Tensor, target: Tensor) -> Any:
            lane = loop.lanes[kind.doubled]
            inputs = lane.input._replace(sample=lane.input.sample.clone(), timestep=lane.input.timestep.clone())
            twin = dataclasses.replace(
                loop,
                lanes={kind.doubled: lane._replace(unet=denoiser.unet, input=inputs)},
                step=loop.step.clone(),
                frozen=loop.frozen.clone(),
            )
            assert (
                chain is not None and isinstance(denoiser.unet, EngineUNet) and isinstance(denoiser.chain, EngineChain)
            )
            given, _ = plain(twin, kind, denoiser.chain, z.clone(), before, alive.clone(), target)
            made = plain(loop, kind, chain, z, before, alive, target)
            found.append(apart(given[0], made[0][0]))
            return made

        monkeypatch.setattr(Loop, "clean_step", both)
        demo("engine=eager", samples=samples)
    assert len(found) == 12
    worst = torch.stack(found).amax(1)
    assert (worst <= 1e-3).sum() >= 9 and worst.max() <= KINK, worst


@pytest.mark.slow
def test_demo_sample_by_sample(demo: Demo) -> None:
    """Trajectories of single samples, guided to the end: those that pass no kink on the way end where eager ends."""
    found = []
    overrides = ["synthesis.batch_size=1", "engine=onnxruntime"]
    with demo.painter("synthesis.batch_size=1", "engine=eager") as eager, demo.painter(*overrides) as engine:
        for sample_id in range(16):
            ids = torch.tensor([sample_id])
            given = (ids[None], ids % 10, ids % 10, True, True)
            ends = [painter._denoise(*given)[1].latents for painter in (engine, eager)]
            found.append(apart(*ends).item())
    print(" ".join(f"{value:.0e}" for value in sorted(found)))
    assert sum(value <= 1e-3 for value in found) >= 4


@pytest.mark.slow
def test_demo_guided_to_the_end(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve guided steps magnify a difference of 1e-5, wherever it comes from, to a tenth of a latent."""
    eager, engine = demo("engine=eager"), demo("engine=onnxruntime")
    found = apart(engine.latents, eager.latents).median()

    def nudged(*given: Any) -> Tensor:
        noise = philox_normal(*given)
        return noise * (1 + 1e-5 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)))

    steered = apart(demo("engine=eager", "guidance.mode=none").latents, eager.latents).median()
    monkeypatch.setattr(painter_module, "philox_normal", nudged)
    floor = apart(demo("engine=eager").latents, eager.latents).median()
    assert floor > 1e-3 and found <= 3 * floor
    assert found < steered / 2
    print(f"{found:.3f} apart, {floor:.3f} from noise alone; guidance moves by {steered:.3f}")
