"""Every engine that a machine can run: built or found in the cache, compared with eager, timed side by side.

    diffdfkd engines fashion --json engines.json
    diffdfkd engines ~/priors/my-prior synthesis.batch_size=16

An engine that is not installed, refuses a stage or computes something else has a row too, with the reason. Those that
can be used are timed interleaved. On the CPU ``peak_memory_mib`` is what opening an engine and calling it twice added
to what the process held; on CUDA it is torch's own peak, which does not see what an engine allocates by itself.
"""

import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffdfkd.benchmarks.conditions import QUANTILES, conditions, forget_peak, peak_memory
from diffdfkd.engine.backends.build import Backend, Make, Settings, build, open_runner, prepare
from diffdfkd.engine.backends.choose import MODULES
from diffdfkd.engine.backends.serve import Subject, run_settings
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import fitting
from diffdfkd.engine.painter import SMALLER
from diffdfkd.engine.parity import Refused
from diffdfkd.engine.recipe import Recipe, load_recipe
from diffdfkd.engine.runner import NoEngine, Runner

STAGES = ("unet", "chain", "vjp")
REPETITIONS = 20
STAND_IN_CLASSES = 10
CPU: tuple[tuple[Backend, torch.dtype], ...] = (
    ("eager", torch.float32),
    ("eager", torch.bfloat16),
    ("compiled", torch.float32),
    ("compiled", torch.bfloat16),
    ("onnxruntime", torch.float32),
    ("openvino", torch.float32),
    ("openvino", torch.bfloat16),
)
CUDA: tuple[tuple[Backend, torch.dtype], ...] = tuple(
    (engine, precision)
    for engine in ("eager", "compiled", "onnxruntime", "tensorrt", "tensorrt-rtx")
    for precision in (torch.float32, torch.float16, torch.bfloat16)
)


@dataclass
class Row:
    """One engine of one stage."""

    stage: str
    engine: str
    precision: str
    batch: int
    usable: bool
    reason: str | None = None
    parity_max_abs: float | None = None
    parity_relative: float | None = None
    """Of the values; of the gradient it is ``gradient_relative``."""
    gradient_relative: float | None = None
    cosine: float | None = None
    calls_per_second: dict[str, float] | None = None
    """Median, and the quantiles of the calls."""
    times_eager: float | None = None
    """Speed over eager float32, by the medians."""
    build_seconds: float | None = None
    peak_memory_mib: float | None = None


def examine(source: str, overrides: Sequence[str], json_file: Path | None) -> str:
    """The rows of all stages as a table; writes them to ``json_file``. Raises UserError as a run does."""
    from diffdfkd.recipes.command import refuse_json
    from diffdfkd.recipes.table import table

    refuse_json(json_file)
    subject = subject_from(source, overrides)
    settings = run_settings(subject.recipe)
    rows: list[Row] = []
    for stage in STAGES:
        with fitting("synthesis.batch_size", f"a batch of {subject.images.usual:,} images", SMALLER):
            rows += measure(subject, stage, settings)
    device = subject.context.device
    if json_file is not None:
        content = {"conditions": conditions(device), "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    heads = ("stage", "engine", "precision", "calls/s", "x eager", "parity", "cosine", "build s", "MiB", "")
    return table(heads, [_cells(row) for row in rows], widest=90)


def subject_from(source: str, overrides: Sequence[str]) -> Subject:
    """What the stages are made of, by a recipe, or a prior's folder with a small untrained teacher."""
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.painter import refuse_batch
    from diffdfkd.recipes.engines import subject_of
    from diffdfkd.recipes.launch import settle_machine
    from diffdfkd.recipes.run import load_prior_for, use_device

    alone = Path(source).is_dir()
    recipe = stand_in_recipe(source, overrides) if alone else load_recipe(source, overrides)
    if recipe.guidance.mode == "none":
        raise UserError("guidance.mode: none has no chain to look at; give clean")
    recipe = settle_machine(recipe)
    use_device(recipe)
    if alone:
        teacher = build_classifier(recipe.student, recipe.teacher, field="student", seed=0)
    else:
        teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher")
    teacher = teacher.to(recipe.device).eval().requires_grad_(False)
    prior = load_prior_for(recipe, teacher)
    refuse_batch(prior, recipe.synthesis.batch_size)
    return subject_of(recipe, prior, teacher)


def stand_in_recipe(prior: str, overrides: Sequence[str]) -> Recipe:
    """A recipe around a prior alone."""
    classes = [f"class {index}" for index in range(STAND_IN_CLASSES)]
    network = {"architecture": "resnet18"}
    content = {"prior": prior, "teacher": {**network, "classes": classes}, "student": network}
    return load_recipe({**content, "synthesis": {"batch_size": 8}}, overrides)


def measure(subject: Subject, stage: str, settings: Settings) -> list[Row]:
    """A row for each engine of a stage, those that can be used timed interleaved."""
    make, batch = subject.make(stage), subject.images.usual
    device = subject.context.device
    rows: list[Row] = []
    runners: list[tuple[Row, Runner]] = []
    for engine, precision in CUDA if device.type == "cuda" else CPU:
        name = str(precision).removeprefix("torch.")
        row = Row(stage, engine, name, batch, usable=False)
        rows.append(row)
        inputs = make(precision).examples(make(precision).specification.rows, 0)
        try:
            built = build(make, engine, precision, settings)
            built.runner.close()
            runner, added = _opened(make, engine, precision, settings, inputs)
        except Refused as reason:
            _note(row, reason.parity)
            row.reason = str(reason)
            continue
        except NoEngine as reason:
            row.reason = f"{MODULES.get(engine, engine)}: {reason}" if engine in MODULES else str(reason)
            continue
        row.usable, row.build_seconds = True, round(built.seconds, 1)
        row.peak_memory_mib = round(added / 2**20, 1)
        if built.parity is not None:
            _note(row, built.parity)
        runners.append((row, runner))
    _time(runners, make(torch.float32).examples(make(torch.float32).specification.rows, 0))
    for _, runner in runners:
        runner.close()
    return rows


def _opened(
    make: Make, engine: Backend, precision: torch.dtype, settings: Settings, inputs: Sequence[torch.Tensor]
) -> tuple[Runner, int]:
    """A runner of what has been built, and the bytes that opening it and calling it twice added."""
    stage, folder = make(precision), Path()
    if (engine, precision) != ("eager", torch.float32):
        stage, entry = prepare(make, engine, precision, settings)
        folder = entry.folder
    gc.collect()
    before = _held(stage.device)
    runner = open_runner(stage, engine, precision, settings, folder)
    for _ in range(2):
        runner(*inputs)
    # The system counts pages by the hundred, so that a little less than nothing can come out.
    return runner, max(0, _peak(stage.device) - before)


def _note(row: Row, parity: Any) -> None:
    row.parity_max_abs, row.parity_relative = parity.max_abs, parity.relative
    row.gradient_relative, row.cosine = parity.gradient, parity.cosine


def _time(runners: Sequence[tuple[Row, Runner]], inputs: Sequence[torch.Tensor]) -> None:
    spent: list[list[float]] = [[] for _ in runners]
    for repetition in range(REPETITIONS + 1):
        for (_, runner), times in zip(runners, spent, strict=True):
            started = time.perf_counter()
            outputs = runner(*inputs)
            if outputs[0].is_cuda:
                torch.cuda.synchronize(outputs[0].device)
            if repetition:
                times.append(time.perf_counter() - started)
    eager = statistics.median(spent[0])
    for (row, _), times in zip(runners, spent, strict=True):
        ordered = torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist()
        # The slowest tenth of the calls makes the lowest rate.
        row.calls_per_second = {
            f"p{round(100 * q)}": round(1 / seconds, 3) for q, seconds in zip(QUANTILES, reversed(ordered), strict=True)
        }
        row.times_eager = round(eager / statistics.median(times), 3)


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    forget_peak()
    return peak_memory("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    error = row.gradient_relative if row.gradient_relative is not None else row.parity_relative
    return (
        row.stage,
        row.engine,
        row.precision,
        shown(row.calls_per_second["p50"] if row.calls_per_second else None, ".2f"),
        shown(row.times_eager, ".2f"),
        shown(error, ".1e"),
        shown(row.cosine, ".4f"),
        shown(row.build_seconds, ".1f"),
        shown(row.peak_memory_mib, ".0f"),
        row.reason or "",
    )
