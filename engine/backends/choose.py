"""``engine=auto``: the fastest engine that is installed and proves equal, by a short trial that pays for itself.

What a trial found is remembered in the cache, what was taken is frozen into the run. Speeds are remembered, and of
refusals those alone that would come again: a wrong result, a stage that cannot be exported. The rule: a trial may spend
a tenth of the time that the run would take in eager mode, so that a short run is eager at once and a long one loses a
tenth at worst. Precision is never chosen: it is what the recipe says. A cache that cannot be used leaves eager, since
who asked for no engine can do without.
"""

import logging
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from diffdfkd.engine.backends.build import Backend, Make, Settings, build, graph_precision
from diffdfkd.engine.backends.eager import EagerRunner
from diffdfkd.engine.backends.identity import engine_identity, trial_identity
from diffdfkd.engine.backends.serve import Subject, field_of, run_settings, stages_of
from diffdfkd.engine.cheap_steps import light_steps
from diffdfkd.engine.combinations import guided_steps, round_samples, step_runs
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import fitting
from diffdfkd.engine.onnx_files import deepest_line
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.runner import NoEngine, Runner

SHARE = 0.1
"""Of the run's time in eager mode that a trial may spend."""
FEW_CALLS = 60
"""Below so many calls of a stage nothing is tried: looking at eager alone would cost more than is to be gained."""
GAIN = 1.05
"""How much faster than eager an engine must be to be taken: less is noise."""
REPETITIONS = 3

MODULES: Mapping[Backend, str] = {
    "compiled": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
SECONDS: Mapping[Backend, float] = {
    "eager": 0,
    "onnxruntime": 40,
    "openvino": 45,
    "compiled": 60,
    "tensorrt": 120,
    "tensorrt-rtx": 60,
}
"""What to expect of a build that is not in the cache, from the demo on two cores (docs/engines.md); a guess."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was taken for a stage, and why."""

    stage: str
    engine: Backend
    reason: str
    tried: Mapping[str, str]
    """What became of each engine, in words."""


def settle_engines(recipe: Recipe, subject: Callable[[], Subject]) -> tuple[Recipe, list[Choice]]:
    """The recipe with an engine in the place of each ``auto``; ``subject`` is asked only where something is tried."""
    calls = stage_calls(recipe)
    choices = []
    for stage, count in calls.items():
        field = field_of(stage)
        if getattr(recipe.engine, field) != "auto":
            continue
        if stage == "unet" and recipe.guidance.mode in ("exact", "reuse"):
            choices.append(
                Choice(field, "eager", f"guidance.mode={recipe.guidance.mode} takes gradients through it", {})
            )
        elif recipe.guidance.micro_batch is not None:
            choices.append(Choice(field, "eager", "guidance.micro_batch splits its batches", {}))
        elif stage == "unet" and recipe.synthesis.reuse_every > 1:
            reason = f"synthesis.reuse_every={recipe.synthesis.reuse_every} runs parts of it, which no engine does"
            choices.append(Choice(field, "eager", reason, {}))
        elif count < FEW_CALLS:
            choices.append(Choice(field, "eager", f"{count} calls are too few for a trial", {}))
        else:
            choices.append(_choose(stage, count, recipe, subject))
    chosen = {choice.stage: choice.engine for choice in choices}
    if recipe.guidance.mode == "none" and recipe.engine.chain == "auto":
        chosen["chain"] = "eager"
    engine = recipe.engine.model_copy(update=chosen)
    return recipe.model_copy(update={"engine": engine}), choices


def _choose(stage: str, calls: int, recipe: Recipe, subject: Callable[[], Subject]) -> Choice:
    try:
        settings = run_settings(recipe)
    except UserError as reason:
        # No folder is known for the cache.
        log.warning("engine=auto: eager is taken for the %s: %s", stage, reason)
        return Choice(field_of(stage), "eager", f"engines cannot be kept ({reason})", {})
    return choose(stage, calls, subject(), settings)


def stage_calls(recipe: Recipe) -> dict[str, int]:
    """How often the run calls each stage."""
    synthesis = recipe.synthesis
    block, runs = synthesis.batch_size * synthesis.fan_out, step_runs(synthesis)
    batches = sum(-(-round_samples(recipe, round) // block) for round in range(recipe.rounds))
    stages = stages_of(recipe)
    calls = {"unet": batches * sum(runs)}
    guided = guided_steps(recipe.guidance, synthesis.steps)
    light = light_steps(recipe.guidance, synthesis.steps)
    # One field decides on both: the heavier of the two is what is tried.
    if "chain" in stages:
        calls["chain"] = batches * sum(map(operator.mul, runs, map(operator.gt, guided, light)))
    elif "light chain" in stages:
        calls["light chain"] = batches * sum(map(operator.mul, runs, guided))
    return calls


def choose(stage_name: str, calls: int, subject: Subject, settings: Settings) -> Choice:
    """The fastest engine for so many calls of a stage."""
    make, precision = subject.make(stage_name), subject.precision
    plain = make(graph_precision("eager", precision))
    inputs = plain.examples(plain.specification.rows, 0)
    # Nothing is asked of it: it is what runs where no engine is taken.
    eager = EagerRunner(plain)
    with fitting("synthesis.batch_size", f"a batch of {plain.specification.rows:,} rows", "give a smaller one"):
        eager_seconds = _seconds([eager], inputs)[0]
    budget = SHARE * calls * eager_seconds
    found: dict[Backend, float] = {"eager": eager_seconds}
    tried = {"eager": _milliseconds(eager_seconds)}
    for backend in candidates(plain.device):
        reason, seconds, spent = _try(make, backend, precision, settings, eager, inputs, eager_seconds, budget)
        budget -= spent
        tried[backend] = reason
        if seconds is not None:
            found[backend] = seconds
    best = min(found, key=lambda backend: found[backend])
    if found["eager"] < GAIN * found[best]:
        best = "eager"
    words = ", ".join(f"{backend} {what}" for backend, what in tried.items())
    return Choice(field_of(stage_name), best, words, tried)


def candidates(device: torch.device) -> Sequence[Backend]:
    """Engines for a device that might be installed, the cheapest to build first."""
    if device.type == "cuda":
        return ("compiled", "onnxruntime", "tensorrt-rtx", "tensorrt")
    return ("onnxruntime", "openvino", "compiled")


def _try(
    make: Make,
    backend: Backend,
    precision: torch.dtype,
    settings: Settings,
    eager: Runner,
    inputs: Sequence[Tensor],
    eager_seconds: float,
    budget: float,
) -> tuple[str, float | None, float]:
    """(what became of it, seconds of a call if it can be used, seconds that finding out took)."""
    if find_spec(MODULES[backend]) is None:
        return "not installed", None, 0.0
    stage = make(graph_precision(backend, precision))
    identity = trial_identity(stage, backend, precision, settings)
    started = time.perf_counter()
    try:
        if (before := settings.cache.find("trial", identity)) is not None:
            return *_told(before.details, eager_seconds), 0.0
        built = settings.cache.find(backend, engine_identity(stage, backend, precision, settings)) is not None
        expected = (0.0 if built else SECONDS[backend] * _scale(eager_seconds)) + 6 * eager_seconds
        if expected > budget:
            return f"left out (a trial of about {expected:.0f} s would not pay)", None, 0.0
        log.info("engine=auto: trying %s for the %s", backend, stage.name)
        details, lasting = _trial(make, backend, precision, settings, eager, inputs)
    except (UserError, OSError) as reason:
        # The cache's, or a compiler's own files: nothing else here reads what a user gave.
        return f"left out ({reason})", None, time.perf_counter() - started
    spent = time.perf_counter() - started
    if lasting:
        try:
            settings.cache.obtain("trial", identity, lambda folder: details)
        except UserError as reason:
            log.warning("engine=auto: what %s came to for the %s is not remembered: %s", backend, stage.name, reason)
    return *_told(details, eager_seconds), spent


def _trial(
    make: Make, backend: Backend, precision: torch.dtype, settings: Settings, eager: Runner, inputs: Sequence[Tensor]
) -> tuple[Mapping[str, Any], bool]:
    """(what is remembered of it, whether it would come to the same another time)."""
    try:
        runner = build(make, backend, precision, settings).runner
    except NoEngine as reason:
        return {"fault": str(reason)}, reason.lasting
    try:
        ours, theirs = _seconds([eager, runner], inputs)
    except (MemoryError, RuntimeError) as error:
        # As where there is memory for it alone, and not beside eager.
        return {"fault": deepest_line(error)}, False
    finally:
        runner.close()
    return {"ratio": theirs / ours}, True


def _told(details: Mapping[str, Any], eager_seconds: float) -> tuple[str, float | None]:
    """(what a trial came to in words, seconds of a call if the engine can be used)."""
    if "fault" in details:
        return f"refused ({details['fault']})", None
    seconds = details["ratio"] * eager_seconds
    return _milliseconds(seconds), seconds


def _scale(eager_seconds: float) -> float:
    """How much longer than the demo's a build is expected to take, by the size of what a call computes."""
    return max(1.0, eager_seconds / 2)


def _seconds(runners: Sequence[Runner], inputs: Sequence[Tensor]) -> list[float]:
    """Median seconds of a call of each, interleaved, after one that warms up."""
    spent: list[list[float]] = [[] for _ in runners]
    for repetition in range(REPETITIONS + 1):
        for runner, times in zip(runners, spent, strict=True):
            started = time.perf_counter()
            outputs = runner(*inputs)
            if outputs[0].is_cuda:
                torch.cuda.synchronize(outputs[0].device)
            if repetition:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in spent]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
